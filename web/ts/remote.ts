/** Endpoints that are asked over HTTP: Weir's gateways, and providers with OpenAI's or Anthropic's API. */
import { events } from "./sse.js";
import { type Endpoint, type Message, type Options, type Piece, type Request, WeirError } from "./types.js";
import type { ClusterSpec, End, FailureKind, ProviderSpec } from "./types.js";

/** Output of Anthropic's models where the request doesn't say; they must be told. */
const MAX_TOKENS = 4096;

type Json = Record<string, unknown>;

/** An HTTP API. */
export class Remote implements Endpoint {
  readonly #spec: ClusterSpec | ProviderSpec;
  #model: string | undefined;

  constructor(spec: ClusterSpec | ProviderSpec) {
    this.#spec = spec;
    this.#model = spec.model;
  }

  describe(): string {
    return `${this.#spec.url}${this.#model ? `, ${this.#model}` : ""}`;
  }

  close(): void {}

  async *answer({ input, options }: Request): AsyncGenerator<Piece> {
    const anthropic = this.#spec.kind === "provider" && this.#spec.api === "anthropic";
    if (anthropic) {
      if ("prompt" in input) throw new WeirError("invalid", "Anthropic's API has no plain completion; use chat");
      const body = anthropicBody(await this.#name(options), input.messages, options);
      yield* anthropicPieces(await this.#post("messages", body, options.signal));
      return;
    }
    const chat = "messages" in input;
    const body = openaiBody(await this.#name(options), options, this.#spec.kind === "cluster");
    const ask = chat ? { ...body, messages: input.messages } : { ...body, prompt: input.prompt };
    yield* openaiPieces(await this.#post(chat ? "chat/completions" : "completions", ask, options.signal));
  }

  /** The model's name; a gateway is asked for its first. */
  async #name(options: Options): Promise<string> {
    if (this.#model === undefined) {
      const response = await this.#fetch("models", { signal: options.signal ?? null });
      const list = ((await response.json()) as { data?: { id: string }[] }).data ?? [];
      this.#model = list[0]?.id;
      if (this.#model === undefined) throw new WeirError("failed", `${this.#spec.url} serves no model`);
    }
    return this.#model;
  }

  async #post(path: string, body: Json, signal: AbortSignal | undefined): Promise<AsyncGenerator<string>> {
    const response = await this.#fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal: signal ?? null,
    });
    if (!response.body) throw new WeirError("failed", `${this.#spec.url} sent nothing`);
    return events(response.body);
  }

  async #fetch(path: string, init: RequestInit): Promise<Response> {
    const { url, key } = this.#spec;
    const root = url.replace(/\/+$/, "");
    const base = this.#spec.kind === "cluster" && !root.endsWith("/v1") ? `${root}/v1` : root;
    const headers = new Headers(init.headers);
    if (key !== undefined && this.#spec.kind === "provider" && this.#spec.api === "anthropic") {
      headers.set("x-api-key", key);
      headers.set("anthropic-version", "2023-06-01");
      headers.set("anthropic-dangerous-direct-browser-access", "true");
    } else if (key !== undefined) headers.set("authorization", `Bearer ${key}`);
    let response: Response;
    try {
      response = await fetch(`${base}/${path}`, { ...init, headers });
    } catch (error) {
      if (init.signal?.aborted) throw new WeirError("cancelled", "cancelled");
      throw new WeirError("unreachable", `${url} can't be reached (${String(error)})`);
    }
    if (response.ok) return response;
    const text = await response.text().catch(() => "");
    throw new WeirError(kindOf(response.status), `${url}: ${messageIn(text) || `HTTP ${response.status}`}`);
  }
}

function kindOf(status: number): FailureKind {
  if (status === 429 || status === 503) return "busy";
  return status >= 400 && status < 500 ? "invalid" : "failed";
}

/** The message in an error's body. */
function messageIn(text: string): string {
  try {
    const error = (JSON.parse(text) as { error?: { message?: string } | string }).error;
    return (typeof error === "string" ? error : error?.message) ?? text.slice(0, 500);
  } catch {
    return text.slice(0, 500);
  }
}

function openaiBody(model: string, options: Options, ours: boolean): Json {
  const body: Json = {
    model,
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: options.maxTokens,
    temperature: options.temperature ?? 0,
    top_p: options.topP,
    frequency_penalty: options.frequencyPenalty,
    presence_penalty: options.presencePenalty,
    seed: options.seed,
    stop: options.stop,
  };
  if (!ours) return body;
  const { topK: top_k, minP: min_p, repetitionPenalty: repetition_penalty, ignoreEos: ignore_eos, priority } = options;
  const weir = priority === undefined ? undefined : { priority };
  return { ...body, top_k, min_p, repetition_penalty, ignore_eos, weir };
}

async function* openaiPieces(events: AsyncGenerator<string>): AsyncGenerator<Piece> {
  let reason: string | undefined;
  let usage: { prompt_tokens?: number; completion_tokens?: number; prompt_tokens_details?: { cached_tokens?: number } } = {};
  for await (const data of events) {
    if (data === "[DONE]") break;
    const event = parse(data) as {
      choices?: { delta?: { content?: string }; text?: string; finish_reason?: string }[];
      usage?: typeof usage | null;
      error?: { message?: string };
    };
    if (event.error) throw new WeirError("failed", event.error.message ?? "the answer broke off");
    const choice = event.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text;
    if (text) yield { text };
    reason = choice?.finish_reason ?? reason;
    usage = event.usage ?? usage;
  }
  if (reason === undefined) throw new WeirError("failed", "the answer broke off");
  yield {
    end: ended(reason === "length", {
      promptTokens: usage.prompt_tokens ?? 0,
      cachedTokens: usage.prompt_tokens_details?.cached_tokens ?? 0,
      outputTokens: usage.completion_tokens ?? 0,
    }),
  };
}

function anthropicBody(model: string, messages: Message[], options: Options): Json {
  const system = messages.filter((message) => message.role === "system").map((message) => message.content);
  return {
    model,
    stream: true,
    max_tokens: options.maxTokens ?? MAX_TOKENS,
    system: system.length > 0 ? system.join("\n\n") : undefined,
    messages: messages.filter((message) => message.role !== "system"),
    temperature: options.temperature ?? 0,
    top_p: options.topP,
    top_k: options.topK,
    stop_sequences: options.stop,
  };
}

async function* anthropicPieces(events: AsyncGenerator<string>): AsyncGenerator<Piece> {
  const usage = { promptTokens: 0, cachedTokens: 0, outputTokens: 0 };
  let reason: string | undefined;
  for await (const data of events) {
    const event = parse(data) as {
      type?: string;
      message?: { usage?: { input_tokens?: number; cache_read_input_tokens?: number } };
      delta?: { text?: string; stop_reason?: string };
      usage?: { output_tokens?: number };
      error?: { message?: string };
    };
    if (event.error) throw new WeirError("failed", event.error.message ?? "the answer broke off");
    if (event.type === "message_start") {
      usage.promptTokens = event.message?.usage?.input_tokens ?? 0;
      usage.cachedTokens = event.message?.usage?.cache_read_input_tokens ?? 0;
    }
    if (event.type === "content_block_delta" && event.delta?.text) yield { text: event.delta.text };
    reason = event.delta?.stop_reason ?? reason;
    usage.outputTokens = event.usage?.output_tokens ?? usage.outputTokens;
  }
  if (reason === undefined) throw new WeirError("failed", "the answer broke off");
  yield { end: ended(reason === "max_tokens", usage) };
}

function ended(cut: boolean, usage: End["usage"]): Omit<End, "endpoint"> {
  return { reason: cut ? "length" : "stop", usage };
}

function parse(data: string): unknown {
  try {
    return JSON.parse(data);
  } catch {
    throw new WeirError("failed", "the answer is not what it should be: an event is not JSON");
  }
}
