/** Endpoints over HTTP, and the choice between them, against servers that say what is expected. */
import assert from "node:assert/strict";
import { createServer } from "node:http";
import { after, before, test } from "node:test";
import { Weir, WeirError } from "../dist/index.js";

const servers = [];
const requests = [];

/** A server that answers every POST with these events, or with that status. */
async function api(events, status = 200) {
  const server = createServer(async (request, response) => {
    let body = "";
    for await (const chunk of request) body += chunk;
    requests.push({ path: request.url, headers: request.headers, body: body && JSON.parse(body) });
    if (request.method === "GET") return response.end(JSON.stringify({ data: [{ id: "first" }, { id: "second" }] }));
    response.writeHead(status, { "content-type": "text/event-stream" });
    if (status !== 200) return response.end(JSON.stringify({ error: { message: "no room" } }));
    // In pieces that don't care where lines end.
    const text = events.map((event) => `data: ${typeof event === "string" ? event : JSON.stringify(event)}\n\n`).join("");
    for (let at = 0; at < text.length; at += 7) response.write(text.slice(at, at + 7));
    response.end();
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  servers.push(server);
  return `http://127.0.0.1:${server.address().port}`;
}

const delta = (content) => ({ choices: [{ delta: { content } }] });
const OPENAI = [
  delta("Hel"),
  delta("lo, wörld"),
  { choices: [{ delta: {}, finish_reason: "length" }] },
  { choices: [], usage: { prompt_tokens: 9, completion_tokens: 2, prompt_tokens_details: { cached_tokens: 4 } } },
  "[DONE]",
];
const ANTHROPIC = [
  { type: "message_start", message: { usage: { input_tokens: 5 } } },
  { type: "content_block_delta", delta: { text: "Hello" } },
  { type: "message_delta", delta: { stop_reason: "end_turn" }, usage: { output_tokens: 3 } },
  { type: "message_stop" },
];
const MESSAGES = [{ role: "user", content: "Hi" }];

before(() => (requests.length = 0));
after(() => servers.forEach((server) => (server.closeAllConnections(), server.close())));

test("a cluster answers", async () => {
  const weir = new Weir();
  await weir.add("home", { kind: "cluster", url: await api(OPENAI), key: "k" });
  const answer = weir.chat(MESSAGES, { maxTokens: 2, minP: 0.1, priority: "background" });
  assert.equal(await answer.text(), "Hello, wörld");
  const usage = { promptTokens: 9, cachedTokens: 4, outputTokens: 2 };
  assert.deepEqual(answer.end, { reason: "length", usage, endpoint: "home" });
  const { path, headers, body } = requests.at(-1);
  assert.equal(path, "/v1/chat/completions");
  assert.equal(headers.authorization, "Bearer k");
  assert.deepEqual([body.model, body.max_tokens, body.min_p, body.weir], ["first", 2, 0.1, { priority: "background" }]);
});

test("a provider with Anthropic's API answers", async () => {
  const weir = new Weir();
  await weir.add("far", { kind: "provider", api: "anthropic", url: `${await api(ANTHROPIC)}/v1`, key: "k", model: "m" });
  const answer = weir.chat([{ role: "system", content: "Be brief." }, ...MESSAGES]);
  assert.equal(await answer.text(), "Hello");
  assert.equal(answer.end.reason, "stop");
  const { path, headers, body } = requests.at(-1);
  assert.deepEqual([path, headers["x-api-key"], body.system, body.messages], ["/v1/messages", "k", "Be brief.", MESSAGES]);
});

test("auto goes on to the next endpoint before the first word, not after it", async () => {
  const weir = new Weir();
  await weir.add("full", { kind: "cluster", url: await api([], 503) });
  await weir.add("breaks", { kind: "cluster", url: await api([delta("Half")]) });
  await weir.add("good", { kind: "cluster", url: await api(OPENAI) });
  await weir.add("auto", { kind: "auto", endpoints: ["full", "good"] });
  const answer = weir.chat(MESSAGES, { endpoint: "auto" });
  assert.equal(await answer.text(), "Hello, wörld");
  assert.equal(answer.end.endpoint, "good");
  await weir.add("auto", { kind: "auto", endpoints: ["good", "breaks"], rule: () => "breaks" });
  await assert.rejects(weir.chat(MESSAGES, { endpoint: "auto" }).text(), { kind: "failed" });
  await assert.rejects(weir.chat(MESSAGES, { endpoint: "full" }).text(), { kind: "busy", message: /no room/ });
});

test("what can't be reached says so", async () => {
  const weir = new Weir();
  await weir.add("gone", { kind: "cluster", url: "http://127.0.0.1:9", model: "m" });
  await assert.rejects(weir.chat(MESSAGES).text(), { kind: "unreachable" });
  await assert.rejects(weir.chat(MESSAGES, { endpoint: "nobody" }).text(), WeirError);
});
