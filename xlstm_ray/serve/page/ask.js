// The prompt box, and the answers below it.

import { counted, number, plainly, stream } from "./service.js";

const at = (id) => document.getElementById(id);
const KEYS = "Ctrl+Enter asks.";

export class Ask {
  constructor(wrong) {
    this.wrong = wrong; // tells an error; null: there is none now
    this.model = undefined;
    this.messages = []; // of the chat so far
    this.under = null; // what stops the answer that is under way
    at("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    at("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
    });
    at("stop").addEventListener("click", () => this.under?.abort());
    at("fresh").addEventListener("click", () => this.begin());
    at("form").addEventListener("change", () => this.begin());
    at("after").addEventListener("change", () => this.begin());
    this.begin();
  }

  get chat() {
    return !at("form-field").hidden && at("form").value === "chat";
  }

  // A chat begins anew; so it does where the document before it is another.
  begin() {
    this.messages = [];
    at("fresh").hidden = true;
    const state = at("after").value;
    const text = state ? `The prompt comes after all of ${state}. ` : "";
    at("prompt-note").textContent = text + (this.chat ? "" : "The model goes on with the text. ") + KEYS;
  }

  // Ask from this document next.
  choose(name) {
    at("after").value = name;
    at("after").dispatchEvent(new Event("change"));
    at("prompt").focus();
  }

  // The documents that can be asked.
  offer(names) {
    const select = at("after");
    const before = select.value;
    const there = [...select.options].slice(1).map((option) => option.value);
    if (there.join("\n") === names.join("\n")) return;
    select.replaceChildren(new Option("nothing", ""), ...names.map((name) => new Option(name, name)));
    select.value = names.includes(before) ? before : "";
    if (select.value !== before) this.begin();
  }

  async send() {
    const prompt = at("prompt").value;
    const state = at("after").value;
    if (this.under || (!prompt && !state)) return at("prompt").focus();
    this.wrong(null);
    const body = {
      model: this.model,
      max_tokens: at("tokens").valueAsNumber,
      temperature: at("temperature").valueAsNumber,
      stream: true,
      stream_options: { include_usage: true, include_progress: true },
      ...(state ? { state } : {}),
    };
    const chat = this.chat;
    const messages = [...this.messages, { role: "user", content: prompt }];
    Object.assign(body, chat ? { messages } : prompt ? { prompt } : {});
    const card = this.card(state, prompt, chat);
    this.under = new AbortController();
    at("stop").hidden = false;
    at("send").disabled = true;
    try {
      const text = await this.read(card, stream(chat ? "/v1/chat/completions" : "/v1/completions", body, this.under.signal));
      if (chat) {
        this.messages = [...messages, { role: "assistant", content: text }];
        at("fresh").hidden = false;
        at("prompt").value = "";
      }
    } catch (error) {
      if (error.name === "AbortError") card.facts.textContent = "Stopped.";
      else {
        this.wrong(plainly(error), error);
        card.facts.textContent = "This did not come to its end.";
      }
    } finally {
      card.progress.hidden = true;
      card.article.classList.add("ended");
      card.article.setAttribute("aria-busy", "false");
      this.under = null;
      at("stop").hidden = true;
      at("send").disabled = false;
    }
  }

  // A place for an answer, above those before it.
  card(state, prompt, chat) {
    const article = at("answer").content.cloneNode(true).firstElementChild;
    const find = (name) => article.querySelector(name);
    const card = { article, text: find(".text"), progress: find("progress"), facts: find(".facts") };
    find(".from").textContent = state ? `After ${state}` : "";
    find(".asked").textContent = prompt + (chat ? "\n\n" : "");
    article.setAttribute("aria-busy", "true");
    at("answers").prepend(article);
    return card;
  }

  // Show what comes, until its end; returns the answer's text.
  async read(card, events) {
    const began = performance.now();
    let first = null;
    let usage = null;
    let reason = null;
    for await (const event of events) {
      const { progress, choices } = event;
      usage = event.usage ?? usage;
      if (progress) this.reading(card, progress);
      for (const choice of choices) {
        const text = choice.text ?? choice.delta?.content ?? "";
        if (first === null) {
          first = performance.now();
          card.progress.hidden = true;
          card.facts.textContent = "";
        }
        card.text.append(text);
        reason = choice.finish_reason ?? reason;
      }
    }
    const made = usage.completion_tokens;
    const seconds = (performance.now() - first) / 1000;
    const rate = made > 1 && seconds > 0 ? `, ${number((made - 1) / seconds)} a second` : "";
    const read = usage.prompt_tokens_details.cached_tokens;
    card.facts.textContent =
      `${counted(made, "token")}${rate}${reason === "length" ? " (as many as were allowed)" : ""}. ` +
      `First one after ${((first - began) / 1000).toPrecision(2)} s; ` +
      `${number(read)} of ${number(usage.prompt_tokens)} tokens before it had been read already.`;
    return card.text.textContent;
  }

  reading(card, { phase, ahead, tokens_done: done, tokens_total: total }) {
    card.progress.hidden = total === 0;
    card.progress.value = total ? done / total : 0;
    card.facts.textContent =
      phase === "queued" && ahead
        ? `Waiting; ${number(ahead)} before it.`
        : `Reading the prompt: ${number(done)} of ${number(total)} tokens.`;
  }
}
