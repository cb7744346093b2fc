//! A made-up model, a node that holds it and requests for it: for tests, and for `benches/decision.rs`.
use std::time::Duration;
use weir_scheduler::{Generate, Held, KvType, ModelId, Profile, Rates, RequestId};

pub(crate) const MODEL: ModelId = ModelId([9; 32]);

pub(crate) fn ask(id: u64, prompt: Vec<u32>, max_tokens: u32) -> Generate {
    Generate { request: RequestId(id), ..Generate::new(MODEL, prompt, max_tokens) }
}

pub(crate) fn profile(name: &str, slots: u32) -> Profile {
    let rates = Rates {
        prefill_tokens_per_s: 1000.0,
        token_time_alone: Duration::from_millis(10),
        token_time_full: Duration::from_millis(20),
    };
    let held = Held {
        model: MODEL,
        name: "made-up".into(),
        text: None,
        context: 1024,
        numerics: "made-up".into(),
        kv: KvType::F16,
        kv_blocks: 256,
        slots,
        rates,
        weights: 0,
        bytes: 0,
        pinned: true,
        resumes: true,
        grammars: true,
        prefixes: Vec::new(),
    };
    Profile { name: name.into(), models: vec![held], ..Profile::default() }
}
