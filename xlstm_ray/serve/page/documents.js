// The documents: what is read, how far it is, and what can be done with it.

import { bytes, call, counted, duration, file, headers, number, plainly, refused } from "./service.js";

const at = (id) => document.getElementById(id);
const path = (name, more = "") => `/v1/states/${encodeURIComponent(name)}${more}`;

const WORDS = {
  queued: "Waiting to be read",
  reading: "Being read",
  ready: "Ready",
  cancelled: "Stopped",
  parked: "Stopped",
  failed: "Failed",
};

export class Documents {
  // ask: the prompt box. wrong: tells an error. look: asks the service for the documents now.
  constructor(ask, wrong, look) {
    Object.assign(this, { ask, wrong, look });
    this.cards = new Map(); // name -> its list item
    this.before = new Map(); // name -> its status at the last look
    this.sending = new Map(); // name -> request
    const drop = at("drop");
    at("file").addEventListener("change", (event) => {
      this.take(event.target.files);
      event.target.value = "";
    });
    const holds = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragover", (event) => {
      if (!holds(event)) return;
      event.preventDefault();
      drop.classList.add("over");
    });
    addEventListener("dragleave", (event) => event.relatedTarget ?? drop.classList.remove("over"));
    addEventListener("drop", (event) => {
      if (!holds(event)) return;
      event.preventDefault();
      drop.classList.remove("over");
      this.take(event.dataTransfer.files);
    });
    at("fork-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.fork();
    });
    at("fork-cancel").addEventListener("click", () => at("fork").close());
  }

  // Whether something is being read or sent, so that it is worth looking often.
  get open() {
    return this.sending.size > 0 || [...this.before.values()].some((status) => status === "queued" || status === "reading");
  }

  take(files) {
    this.wrong(null);
    for (const one of files) this.send(one);
  }

  // A name of a state for a file: letters, digits, and . _ -
  named(name) {
    const plain = name.replace(/\.(txt|md|state)$/i, "").normalize("NFKD").replace(/[^A-Za-z0-9._-]+/g, "-");
    const base = plain.replace(/^[^A-Za-z0-9]+/, "").slice(0, 90) || "document";
    let found = base;
    for (let n = 2; this.cards.has(found); n++) found = `${base}-${n}`;
    return found;
  }

  // fetch does not tell how much was sent; this older way does.
  send(one) {
    const name = this.named(one.name);
    const request = new XMLHttpRequest();
    const show = (share) => this.show({ id: name, status: "sending", share, size: one.size });
    const end = (error) => {
      this.sending.delete(name);
      if (error) {
        this.cards.get(name)?.remove();
        this.cards.delete(name);
        this.wrong(`${one.name}: ${plainly(error)}`, error);
      }
      this.look();
    };
    request.upload.addEventListener("progress", (event) => show(event.loaded / event.total));
    request.addEventListener("load", () => {
      const { status, responseText: text } = request;
      end(status < 300 ? null : refused(status, text, request.getResponseHeader("retry-after")));
    });
    request.addEventListener("error", () => end(new TypeError()));
    request.addEventListener("abort", () => end(null));
    request.open("PUT", path(name));
    for (const [header, value] of Object.entries(headers())) request.setRequestHeader(header, value);
    this.sending.set(name, request);
    show(0);
    request.send(one);
  }

  // Show these, as the service tells them, and no others but those that are being sent.
  update(infos) {
    const names = new Set(infos.map((info) => info.id));
    for (const [name, card] of this.cards) {
      if (names.has(name) || this.sending.has(name)) continue;
      card.remove();
      this.cards.delete(name);
      this.before.delete(name);
    }
    for (const info of infos) {
      if (this.sending.has(info.id)) continue;
      this.show(info);
      const was = this.before.get(info.id);
      if (was && was !== info.status) at("told").textContent = `${info.id}: ${this.facts(info)}`;
      this.before.set(info.id, info.status);
    }
    this.ask.offer(infos.filter((info) => info.status === "ready").map((info) => info.id));
  }

  show(info) {
    let card = this.cards.get(info.id);
    if (!card) {
      card = at("document").content.cloneNode(true).firstElementChild;
      card.querySelector("h3").textContent = info.id;
      card.querySelector("progress").setAttribute("aria-label", `How far ${info.id} is`);
      this.cards.set(info.id, card);
      at("list").prepend(card);
    }
    const facts = this.facts(info);
    if (card.querySelector(".facts").textContent !== facts) card.querySelector(".facts").textContent = facts;
    const progress = card.querySelector("progress");
    const of = info.characters_total || info.tokens_total;
    const done = info.characters_total ? info.characters_done : info.tokens_done;
    const share = info.status === "sending" ? info.share : of ? done / of : 0;
    progress.hidden = !["sending", "queued", "reading"].includes(info.status);
    progress.value = share;
    if (card.dataset.status !== info.status) {
      card.dataset.status = info.status;
      this.actions(card, info);
    }
  }

  facts(info) {
    const { status, tokens_done: done, tokens_total: total, tokens_per_s: rate, seconds_left: left } = info;
    const { characters_done: cut, characters_total: all } = info;
    if (all) return `Cut into tokens: ${Math.floor((cut / all) * 100)} %`;
    if (status === "sending") return `Sending ${bytes(info.size)}: ${Math.floor(info.share * 100)} %`;
    if (status === "ready") return `${WORDS.ready}: ${counted(done, "token")}`;
    const how = total ? `: ${number(done)} of ${number(total)} tokens` : "";
    const fast = rate ? `, ${number(rate)} a second` : "";
    const until = left === null || left === undefined ? "" : `, ${duration(left)} left`;
    return WORDS[status] + how + fast + until + (info.error ? `. ${info.error}` : "");
  }

  actions(card, { id, status }) {
    const held = document.activeElement?.parentElement?.parentElement === card;
    const action = (word, does) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = word;
      button.setAttribute("aria-label", `${word}: ${id}`);
      button.addEventListener("click", () => this.doing(does));
      return button;
    };
    const stop = () => (status === "sending" ? this.sending.get(id)?.abort() : call(path(id, "/cancel"), { method: "POST" }));
    const again = () => call(path(id, "/resume"), { method: "POST" });
    const ready = [
      action("Ask", () => this.ask.choose(id)),
      action("Fork", () => this.asksFork(id)),
      action("Download", () => this.download(id)),
    ];
    const busy = ["sending", "queued", "reading"].includes(status);
    card.querySelector(".actions").replaceChildren(
      ...(status === "ready" ? ready : busy ? [action("Stop", stop)] : [action("Resume", again)]),
      ...(status === "sending" ? [] : [action("Delete", () => this.delete(id))]),
    );
    if (held) card.querySelector(".actions button").focus(); // whoever stood on a button stays in this card
  }

  async doing(does) {
    this.wrong(null);
    try {
      await does();
      this.look();
    } catch (error) {
      this.wrong(plainly(error), error);
    }
  }

  async delete(id) {
    if (!confirm(`Delete ${id}? It would have to be read again.`)) return;
    await call(path(id), { method: "DELETE" });
    at("told").textContent = `${id} was deleted.`;
    at("file").focus();
  }

  async download(id) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await file(path(id, "/file")));
    link.download = `${id}.state`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  asksFork(id) {
    at("fork-title").textContent = `Fork ${id}`;
    at("fork-name").value = this.named(`${id}-fork`);
    at("fork-text").value = "";
    at("fork-error").hidden = true;
    at("fork").dataset.of = id;
    at("fork").showModal();
  }

  async fork() {
    const text = at("fork-text").value;
    const body = { id: at("fork-name").value, state: at("fork").dataset.of, ...(text ? { prompt: text } : {}) };
    try {
      await call("/v1/states", { body });
      at("fork").close();
      this.look();
    } catch (error) {
      at("fork-error").textContent = plainly(error);
      at("fork-error").hidden = false;
    }
  }
}
