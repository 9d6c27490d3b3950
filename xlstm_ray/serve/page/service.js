// Calls of the service. A key, where one is needed, is in this tab's storage and nowhere else.

const KEY = "xlstm-ray-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export class Refused extends Error {
  constructor(status, error, retry) {
    super(error.message);
    this.status = status;
    this.code = error.code;
    this.retry = retry; // seconds
  }
}

export const headers = () => (key.get() ? { authorization: `Bearer ${key.get()}` } : {});

// What went wrong, for a person.
export function plainly(error) {
  if (error instanceof TypeError) return "The service does not answer. Does it still run?";
  const again = error.code === "full" || error.status === 429 ? ` Try again in ${error.retry ?? 1} s.` : "";
  return error.message[0].toUpperCase() + error.message.slice(1) + (error.message.endsWith(".") ? "" : ".") + again;
}

export function refused(status, text, retry) {
  let error;
  try {
    ({ error } = JSON.parse(text));
  } catch {
    error = undefined; // not of this service: a proxy's page, say
  }
  return new Refused(status, error ?? { message: `the service has answered ${status}` }, retry);
}

async function ask(path, { method, body, signal } = {}) {
  const json = body === undefined ? {} : { "content-type": "application/json" };
  const reply = await fetch(path, {
    method: method ?? (body === undefined ? "GET" : "POST"),
    headers: { ...headers(), ...json },
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
  });
  if (!reply.ok) throw refused(reply.status, await reply.text(), reply.headers.get("retry-after"));
  return reply;
}

export const call = async (path, more) => (await ask(path, more)).json();
export const file = async (path) => (await ask(path)).blob();

// The objects of a stream of events.
export async function* stream(path, body, signal) {
  const reply = await ask(path, { body, signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a comment keeps the connection alive
      if (event === "data: [DONE]") return;
      const found = JSON.parse(event.slice(6));
      if (found.error) throw new Refused(reply.status, found.error);
      yield found;
    }
  }
}

export const number = (value) => Math.round(value).toLocaleString("en");

export const counted = (value, word) => `${number(value)} ${word}${value === 1 ? "" : "s"}`;

export function bytes(value) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let n = 0;
  for (; value >= 1024 && n < units.length - 1; n++) value /= 1024;
  return `${value >= 100 || n === 0 ? Math.round(value) : value.toPrecision(3)} ${units[n]}`;
}

export function duration(seconds) {
  const whole = Math.ceil(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}
