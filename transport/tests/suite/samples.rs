//! One of each frame, and random ones.
use std::time::Duration;
use weir_scheduler::{
    BlockKey, CacheStatus, Candidate, Failure, FailureKind, Finish, Generate, Held, KeyId, KvType, Loading,
    Logprob, ModelId, ModelStatus, Offered, Price, Priority, Profile, Rates, RequestId, Sampling, Status,
    TextId, Token, TraceContext, Trust, Usage,
};
use weir_transport::{Fetch, Frame, Hello, Order, Proof, Refusal, RefusalCode, VERSION, Welcome};

/// SplitMix64.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

pub(crate) fn ask() -> Generate {
    Generate {
        request: RequestId(0x0102_0304_0506_0708),
        attempt: 2,
        model: ModelId([0xab; 32]),
        prompt: vec![1, 2, 70_000],
        output: vec![4, 5],
        sampling: Sampling {
            temperature: 0.75,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.05,
            repetition_penalty: 1.1,
            frequency_penalty: -0.5,
            presence_penalty: 0.25,
            seed: u64::MAX - 1,
            logit_bias: vec![(7, -100.0), (8, 2.5)],
            logprobs: Some(5),
        },
        max_tokens: 100,
        stop: vec!["\n\n".into(), "ende".into()],
        ignore_eos: true,
        grammar: None,
        priority: Priority::Interactive,
        deadline: Some(Duration::from_millis(1500)),
        ttft: None,
        max_cost: None,
        otherwise: Vec::new(),
        salt: 99,
        key: KeyId(3),
        tags: vec![("team".into(), "blau".into())],
        trace: TraceContext { trace: 1 << 100 | 5, span: 6, flags: 1 },
    }
}

/// The same, with the first extension.
pub(crate) fn ask_with_grammar() -> Generate {
    Generate { grammar: Some("start: /[a-ü]+/".into()), ..ask() }
}

pub(crate) fn tokens() -> Vec<Token> {
    let candidate = |id, logprob| Candidate { id, logprob, bytes: vec![0xe2, 0x82] };
    let logprob = Logprob { chosen: candidate(9, -0.5), top: vec![candidate(9, -0.5), candidate(1, -2.0)] };
    vec![
        Token { position: 2, id: 9, text: " für".into(), logprob: Some(logprob) },
        Token { position: 3, id: 10, text: String::new(), logprob: None },
    ]
}

fn rates() -> Rates {
    Rates {
        prefill_tokens_per_s: 1234.5,
        token_time_alone: Duration::from_micros(9000),
        token_time_full: Duration::from_micros(31_000),
    }
}

pub(crate) fn profile() -> Profile {
    let held = Held {
        model: ModelId([1; 32]),
        name: "smollm2-135m".into(),
        text: Some(TextId([2; 32])),
        context: 8192,
        numerics: "cpu/vnni/q8/f16".into(),
        kv: KvType::Q8_0,
        kv_blocks: 512,
        slots: 16,
        rates: rates(),
        weights: 0,
        bytes: 0,
        pinned: false,
        resumes: true,
        grammars: false,
        prefixes: Vec::new(),
    };
    Profile {
        name: "küche".into(),
        identity: 0,
        trust: Trust::Guest,
        devices: vec!["AMD EPYC, 2 threads".into()],
        memory_free: 1 << 34,
        models: vec![held],
        ..Profile::default()
    }
}

/// What profiles say beside what those of the first programs said.
pub(crate) fn full_profile() -> Profile {
    let mut full = profile();
    full.bandwidth = 20_000_000_000;
    full.price = Price { prompt: 20, output: 80 };
    full.orders = 7;
    full.trust = Trust::Provider;
    full.labels = vec![("country".into(), "DE".into()), ("kind".into(), "server".into())];
    let model = ModelId([3; 32]);
    full.offers = vec![Offered { model, name: "qwen2".into(), weights: 400, bytes: 500 }];
    full.loading = vec![Loading { model, bytes: 500 }];
    full.failures = vec![(ModelId([4; 32]), "the disk is full".into())];
    let held = &mut full.models[0];
    (held.weights, held.bytes, held.pinned) = (100, 150, true);
    held.prefixes = vec![BlockKey([5; 16]), BlockKey([6; 16])];
    full
}

pub(crate) fn status() -> Status {
    let model = ModelStatus {
        model: ModelId([1; 32]),
        alive: true,
        running: 3,
        waiting: 1,
        queued_tokens: 300,
        kv_blocks_free: 77,
        steps: 1 << 40,
        rates: Some(rates()),
    };
    Status { draining: true, models: vec![model], ..Status::default() }
}

/// The same, and what has changed in a cache: the first extension.
pub(crate) fn caches() -> Status {
    let model = ModelId([1; 32]);
    let cache = CacheStatus { model, new: vec![BlockKey([7; 16])], gone: vec![BlockKey([8; 16])] };
    Status { caches: vec![cache], ..status() }
}

/// The same, where a model works for other schedulers too: the second extension.
pub(crate) fn others() -> Status {
    Status { others: vec![(ModelId([1; 32]), 2)], ..caches() }
}

pub(crate) fn hello() -> Hello {
    Hello {
        versions: vec![VERSION],
        software: "0.1.0".into(),
        name: "küche".into(),
        proof: Some(Proof { key: "ab".repeat(32), signature: "cd".repeat(64) }),
        token: Some("ef".repeat(16)),
        ask: false,
    }
}

pub(crate) fn welcome() -> Welcome {
    let refused = Refusal { code: RefusalCode::Token, message: "it has expired".into() };
    Welcome { version: VERSION, node: 5, heartbeat_ms: 500, refused: Some(refused), ..Welcome::default() }
}

/// One of each kind, named.
pub(crate) fn all() -> Vec<(&'static str, Frame)> {
    let id = RequestId(7);
    let usage = Usage { prompt_tokens: 3, cached_tokens: 1, output_tokens: 4 };
    let failure = Failure { kind: FailureKind::Busy, message: "no room".into() };
    vec![
        ("hello", Frame::hello(&hello())),
        ("welcome", Frame::welcome(&welcome())),
        ("profile", Frame::profile(&profile())),
        ("status", Frame::status(status())),
        ("generate", Frame::generate(ask()).expect("short enough")),
        ("cancel", Frame::cancel(id, 1)),
        ("tokens", Frame::tokens(id, 1, tokens())),
        ("finished", Frame::finished(id, 1, Finish::Length, "…".into(), usage)),
        ("failed", Frame::failed(id, 1, failure)),
        ("order", Frame::order(&Order::Drain { on: true })),
        ("fetch", Frame::fetch(&Fetch::of(TextId([3; 32])))),
        ("piece", Frame::piece(b"some of it")),
        ("caches", Frame::status(caches())),
        ("grammar", Frame::generate(ask_with_grammar()).expect("short enough")),
        ("others", Frame::status(others())),
    ]
}
