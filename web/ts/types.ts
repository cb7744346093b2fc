/** What goes in and what comes out, whichever endpoint answers. */

/** One turn of a conversation, as in OpenAI's chat API. */
export interface Message {
  role: "system" | "user" | "assistant" | "tool" | (string & {});
  content: string;
}

/** A model in this page. */
export interface LocalSpec {
  kind: "local";
  /** A URL of a .gguf file, a file, or the parts of a split one in order. */
  model: string | File | (string | File)[];
  /** SHA-256 of each part, in hexadecimal: what is fetched is checked against it before it is used. */
  sha256?: string | string[];
  /** Where to compute: on a GPU where there is a real one, unless told otherwise. */
  device?: "auto" | "gpu" | "cpu";
  /** Threads, where the processor computes: most of what there are, but one in a page that isn't `crossOriginIsolated`. */
  threads?: number;
  /** Longest sequence in tokens; the model's own, but no more than 8192, where not told. */
  context?: number;
  /** Conversations that are answered at once. */
  slots?: number;
  /** For servers that want one: sent with every request for the model's files. */
  key?: string;
  /** Called while the model is fetched and loaded. */
  onProgress?: (progress: Progress) => void;
  /** The device was lost (a GPU that was reset, most likely). The model is loaded again; the next request waits for it. */
  onLost?: (why: string) => void;
}

/** A Weir gateway. */
export interface ClusterSpec {
  kind: "cluster";
  /** `https://host` or `http://127.0.0.1:8484`. */
  url: string;
  key?: string;
  /** Which of its models; its first where not told. */
  model?: string;
}

/** Anything else that speaks the OpenAI or the Anthropic API. */
export interface ProviderSpec {
  kind: "provider";
  api?: "openai" | "anthropic";
  /** Up to and with `/v1`. */
  url: string;
  key?: string;
  model: string;
}

/** The first endpoint, unless the rule says otherwise or it fails before its first word: then the second. */
export interface AutoSpec {
  kind: "auto";
  /** Names of endpoints added before, in the order of preference. */
  endpoints: string[];
  /** Which of them to try first; all of them, in order, where not told. */
  rule?: (request: Request) => string | undefined;
}

export type EndpointSpec = LocalSpec | ClusterSpec | ProviderSpec | AutoSpec;

/** How far a model is on its way. */
export interface Progress {
  stage: "fetch" | "verify" | "load";
  /** Bytes so far, and in all. */
  done: number;
  total: number;
}

/** How to answer. */
export interface Options {
  /** An endpoint's name; the first that was added, where not told. */
  endpoint?: string;
  maxTokens?: number;
  /** 0, the default here, always takes the likeliest token. */
  temperature?: number;
  topP?: number;
  topK?: number;
  minP?: number;
  frequencyPenalty?: number;
  presencePenalty?: number;
  repetitionPenalty?: number;
  seed?: number;
  stop?: string[];
  priority?: "background" | "normal" | "interactive";
  /** Goes on past the model's end of an answer: for measurements, and not at providers. */
  ignoreEos?: boolean;
  signal?: AbortSignal;
}

/** What an endpoint is asked. */
export interface Request {
  /** A conversation, or a text to go on from. */
  input: { messages: Message[] } | { prompt: string };
  options: Options;
}

/** How an answer ended. */
export interface End {
  reason: "stop" | "length";
  usage: { promptTokens: number; cachedTokens: number; outputTokens: number };
  /** Which endpoint answered. */
  endpoint: string;
}

/** A piece of an answer. */
export type Piece = { text: string } | { end: Omit<End, "endpoint"> };

/** Something that answers. */
export interface Endpoint {
  /** Pieces of text, and at last the end. */
  answer(request: Request): AsyncIterable<Piece>;
  /** What it is, for a person. */
  describe(): string;
  close(): void;
}

export type FailureKind = "invalid" | "busy" | "cancelled" | "unreachable" | "quota" | "damaged" | "failed";

/** Why something didn't work: what failed, with what, what to try. */
export class WeirError extends Error {
  constructor(
    readonly kind: FailureKind,
    message: string,
  ) {
    super(message);
    this.name = "WeirError";
  }
}
