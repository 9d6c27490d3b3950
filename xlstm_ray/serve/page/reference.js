// A listing of /openapi.json.

import { call, plainly } from "./service.js";

const at = (id) => document.getElementById(id);

function element(name, text, ...children) {
  const made = document.createElement(name);
  made.append(text, ...children);
  return made;
}

// A schema's type in a word or two. all: the schema that has the definitions.
function typeOf(schema, all) {
  if (schema.$ref) return typeOf(all.$defs[schema.$ref.split("/").pop()], all);
  if (schema.anyOf) return schema.anyOf.map((one) => typeOf(one, all)).filter((one) => one !== "null").join(" or ");
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {}, all)}`;
  if (schema.type === "object" && schema.properties) {
    return `{ ${Object.entries(schema.properties).map(([key, value]) => `${key}: ${typeOf(value, all)}`).join(", ")} }`;
  }
  return schema.type ?? "any";
}

function fields(schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) => {
    const plain = field.default === undefined || field.default === null ? "" : JSON.stringify(field.default);
    const needed = schema.required?.includes(name) ? "needed" : plain;
    return element("tr", element("th", element("code", name)), element("td", typeOf(field, schema)), element("td", needed));
  });
  for (const row of rows) row.firstChild.scope = "row";
  const titles = ["Field", "Type", "Default"].map((title) => element("th", title));
  for (const title of titles) title.scope = "col";
  return element("table", element("thead", element("tr", ...titles)), element("tbody", ...rows));
}

function entry(path, method, about) {
  const verb = element("span", method.toUpperCase());
  verb.className = "method";
  const body = about.requestBody?.content["application/json"]?.schema;
  const made = element("details", element("summary", verb, " ", element("code", path), " ", element("span", about.description ?? "")));
  made.className = "call";
  made.append(body ? fields(body) : element("p", "It takes no JSON body."));
  if (body?.description) made.insertBefore(element("p", body.description), made.lastChild);
  return made;
}

try {
  const { paths } = await call("/openapi.json");
  for (const [path, methods] of Object.entries(paths)) {
    for (const [method, about] of Object.entries(methods)) at("calls").append(entry(path, method, about));
  }
} catch (error) {
  at("error").hidden = false;
  at("error").textContent = error.status === 401 ? "A key is needed: give it on the page where one asks, then come back." : plainly(error);
}
at("calls").setAttribute("aria-busy", "false");
