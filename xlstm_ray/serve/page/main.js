// What the service is and does now, and the parts of the page that need it.

import { Ask } from "./ask.js";
import { Documents } from "./documents.js";
import { bytes, call, counted, key, number, plainly } from "./service.js";

const at = (id) => document.getElementById(id);
const OFTEN_MS = 500;
const SELDOM_MS = 3000;
const SAID = {
  ready: "Ready",
  loading: "The model is being loaded; this page goes on by itself",
  draining: "The service is stopping: what is under way ends, and nothing new is taken",
};

function wrong(text, error) {
  at("error").hidden = text === null;
  at("error").textContent = text ?? "";
  if (error?.status === 401) askKey();
}

function askKey() {
  key.set("");
  at("key-form").hidden = false;
  at("work").inert = true; // nothing there works without a key
  at("forget").hidden = true;
  at("key").focus();
}

function status(name, text) {
  at("status").dataset.status = name;
  if (at("status").textContent !== text) at("status").textContent = text;
}

const ask = new Ask(wrong);
const documents = new Documents(ask, wrong, look);
let known = false; // whether the model's name and template were asked for
let timer;

// Ask how the service is, and again after a while.
async function look() {
  clearTimeout(timer);
  try {
    const load = await call("/load");
    show(load);
    if (load.status === "ready" && !known) await learn();
    if (load.documents && load.status !== "loading") documents.update((await call("/v1/states")).data);
  } catch (error) {
    if (error.status === 401) {
      status("unknown", key.get() ? "This key is not one of the service's" : "A key is needed");
      return askKey();
    }
    status("gone", plainly(error));
  }
  clearTimeout(timer);
  timer = setTimeout(look, documents.open || at("status").dataset.status !== "ready" ? OFTEN_MS : SELDOM_MS);
}

function show(load) {
  at("key-form").hidden = true;
  at("work").inert = false;
  at("forget").hidden = !key.get();
  at("model").textContent = load.model;
  document.title = `${load.model} – xlstm-ray`;
  ask.model = load.model;
  status(load.status, load.error ?? SAID[load.status]);
  at("glance").hidden = load.status === "loading";
  at("slots").textContent = `${number(Math.min(load.running, load.slots))} of ${number(load.slots)}`;
  at("waiting").textContent = number(load.waiting);
  at("cache").textContent = load.cache ? cache(load.cache) : "off";
  at("shelf").hidden = at("documents").hidden = at("after-field").hidden = !load.documents;
  if (load.documents) at("room").textContent = `${bytes(load.documents.bytes)} of ${bytes(load.documents.most)}`;
}

function cache({ states, bytes: tiers }) {
  const taken = Object.entries(tiers).filter(([, size]) => size > 0);
  return [counted(states, "state"), ...taken.map(([tier, size]) => `${bytes(size)} ${tier === "disk" ? "on" : "in"} ${tier}`)].join(", ");
}

async function learn() {
  const info = await call("/tokenizer_info");
  at("form-field").hidden = info.chat_template === null;
  ask.begin();
  known = true;
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(at("key").value.trim());
  at("key").value = "";
  at("error").hidden = true;
  look();
});
at("forget").addEventListener("click", () => {
  key.set("");
  location.reload();
});
if (matchMedia("(pointer: coarse)").matches) at("prompt").blur(); // a phone's keyboard would hide the page
look();
