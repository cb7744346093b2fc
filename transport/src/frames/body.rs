//! The bodies of frames as they lie on the wire, and how they are made. Enums are numbers here; `convert` reads them.
use super::{Frame, HEADER_BYTES, Kind};
use rkyv::api::high::{HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::Error;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::{Archive, Portable, Serialize};
use weir_scheduler as vocabulary;
use weir_scheduler::{FailureKind, Finish, Priority, RequestId};

/// An archived body that can be validated.
pub(super) trait Archived: Portable + for<'a> CheckBytes<HighValidator<'a, Error>> {}
impl<T: Portable + for<'a> CheckBytes<HighValidator<'a, Error>>> Archived for T {}

pub(super) fn encode<T>(kind: Kind, body: &T) -> Frame
where
    T: for<'a> Serialize<HighSerializer<Vec<u8>, ArenaHandle<'a>, Error>>,
{
    let room = vec![0; HEADER_BYTES];
    let bytes =
        rkyv::api::high::to_bytes_in::<_, Error>(body, room).expect("writing to memory does not fail");
    Frame::finish(kind, bytes)
}

#[derive(Archive, Serialize)]
pub(super) struct Sampling {
    pub temperature: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    pub seed: u64,
    pub logit_bias: Vec<(u32, f32)>,
    pub logprobs: Option<u8>,
}

#[derive(Archive, Serialize)]
pub(super) struct Generate {
    pub request: u64,
    pub attempt: u32,
    pub model: [u8; 32],
    pub prompt: Vec<u32>,
    pub output: Vec<u32>,
    pub sampling: Sampling,
    pub max_tokens: u32,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub priority: u8,
    pub deadline_ns: Option<u64>,
    pub salt: u64,
    pub key: u64,
    pub tags: Vec<(String, String)>,
    pub trace: u128,
    pub span: u64,
    pub trace_flags: u8,
    pub extensions: Vec<Extension>,
}

/// Room for what version 1 doesn't have: numbers are given out by later programs of the same version. Whoever doesn't
/// know one passes over it, unless it says that it must be understood.
#[derive(Archive, Serialize)]
pub(super) struct Extension {
    pub number: u16,
    pub must: bool,
    pub value: Vec<u8>,
}

#[derive(Archive, Serialize)]
pub(super) struct Cancel {
    pub request: u64,
    pub attempt: u32,
}

#[derive(Archive, Serialize)]
#[rkyv(derive(Debug))]
pub(super) struct Candidate {
    pub id: u32,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

#[derive(Archive, Serialize)]
#[rkyv(derive(Debug))]
pub(super) struct Logprob {
    pub chosen: Candidate,
    pub top: Vec<Candidate>,
}

#[derive(Archive, Serialize)]
#[rkyv(derive(Debug))]
pub(super) struct Token {
    pub position: u32,
    pub id: u32,
    pub text: String,
    pub logprob: Option<Logprob>,
}

#[derive(Archive, Serialize)]
#[rkyv(derive(Debug))]
pub(super) struct Tokens {
    pub request: u64,
    pub attempt: u32,
    pub tokens: Vec<Token>,
}

#[derive(Archive, Serialize)]
pub(super) struct Finished {
    pub request: u64,
    pub attempt: u32,
    pub reason: u8,
    pub text: String,
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub output_tokens: u32,
    pub extensions: Vec<Extension>,
}

#[derive(Archive, Serialize)]
pub(super) struct Failed {
    pub request: u64,
    pub attempt: u32,
    pub failure: u8,
    pub message: String,
    pub extensions: Vec<Extension>,
}

#[derive(Archive, Serialize)]
pub(super) struct Rates {
    pub prefill_tokens_per_s: f32,
    pub token_time_alone_ns: u64,
    pub token_time_full_ns: u64,
}

#[derive(Archive, Serialize)]
pub(super) struct ModelStatus {
    pub model: [u8; 32],
    pub alive: bool,
    pub running: u32,
    pub waiting: u32,
    pub queued_tokens: u32,
    pub kv_blocks_free: u32,
    pub steps: u64,
    pub rates: Option<Rates>,
}

#[derive(Archive, Serialize)]
pub(super) struct Status {
    pub draining: bool,
    pub models: Vec<ModelStatus>,
    pub extensions: Vec<Extension>,
}

/// The number of an extension of [`Status`]: what has changed in a model's cache. Its value is the model's id, the number of
/// new blocks (u32, little endian), then 16 bytes each of the new blocks and of those that are gone.
pub(super) const CACHE: u16 = 1;

fn cache(cache: vocabulary::CacheStatus) -> Extension {
    let vocabulary::CacheStatus { model, new, gone } = cache;
    let mut value = Vec::with_capacity(36 + 16 * (new.len() + gone.len()));
    value.extend_from_slice(&model.0);
    value.extend_from_slice(&u32::try_from(new.len()).unwrap_or(u32::MAX).to_le_bytes());
    new.iter().chain(&gone).for_each(|key| value.extend_from_slice(&key.0));
    Extension { number: CACHE, must: false, value }
}

/// The number of an extension of [`Status`]: requests of other schedulers for a model: its id, and their number (u32, little endian).
pub(super) const OTHERS: u16 = 2;

fn others((model, requests): (vocabulary::ModelId, u32)) -> Extension {
    let mut value = model.0.to_vec();
    value.extend_from_slice(&requests.to_le_bytes());
    Extension { number: OTHERS, must: false, value }
}

/// The number of an extension of [`Generate`]: the grammar of its output, UTF-8. Tokens that don't follow it would be wrong,
/// so it must be understood.
pub(super) const GRAMMAR: u16 = 1;

fn grammar(text: &str) -> Extension {
    Extension { number: GRAMMAR, must: true, value: text.as_bytes().to_vec() }
}

fn nanos(d: std::time::Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

pub(super) fn priority_number(priority: Priority) -> u8 {
    match priority {
        Priority::Background => 0,
        Priority::Normal => 1,
        Priority::Interactive => 2,
    }
}

pub(super) fn finish_number(reason: Finish) -> u8 {
    match reason {
        Finish::Stop => 1,
        Finish::Length => 2,
    }
}

pub(super) fn failure_number(kind: FailureKind) -> u8 {
    match kind {
        FailureKind::Invalid => 1,
        FailureKind::NoModel => 2,
        FailureKind::Busy => 3,
        FailureKind::Deadline => 4,
        FailureKind::Cancelled => 5,
        // Providers aren't behind a wire: version 1 has no number for what they do.
        FailureKind::Internal | FailureKind::Upstream => 6,
        // A scheduler's own; as for nodes, it is busy.
        FailureKind::Budget { .. } | FailureKind::Rate { .. } | FailureKind::Unbooked => 3,
    }
}

impl From<vocabulary::Sampling> for Sampling {
    fn from(s: vocabulary::Sampling) -> Self {
        Sampling {
            temperature: s.temperature,
            top_k: s.top_k,
            top_p: s.top_p,
            min_p: s.min_p,
            repetition_penalty: s.repetition_penalty,
            frequency_penalty: s.frequency_penalty,
            presence_penalty: s.presence_penalty,
            seed: s.seed,
            logit_bias: s.logit_bias,
            logprobs: s.logprobs,
        }
    }
}

impl From<vocabulary::Generate> for Generate {
    fn from(ask: vocabulary::Generate) -> Self {
        Generate {
            request: ask.request.0,
            attempt: ask.attempt,
            model: ask.model.0,
            prompt: ask.prompt,
            output: ask.output,
            sampling: ask.sampling.into(),
            max_tokens: ask.max_tokens,
            stop: ask.stop,
            ignore_eos: ask.ignore_eos,
            priority: priority_number(ask.priority),
            deadline_ns: ask.deadline.map(nanos),
            salt: ask.salt,
            key: ask.key.0,
            tags: ask.tags,
            trace: ask.trace.trace,
            span: ask.trace.span,
            trace_flags: ask.trace.flags,
            extensions: ask.grammar.iter().map(|text| grammar(text)).collect(),
        }
    }
}

impl From<vocabulary::Candidate> for Candidate {
    fn from(c: vocabulary::Candidate) -> Self {
        Candidate { id: c.id, logprob: c.logprob, bytes: c.bytes }
    }
}

impl From<vocabulary::Logprob> for Logprob {
    fn from(l: vocabulary::Logprob) -> Self {
        Logprob { chosen: l.chosen.into(), top: l.top.into_iter().map(Candidate::from).collect() }
    }
}

impl From<vocabulary::Token> for Token {
    fn from(t: vocabulary::Token) -> Self {
        Token { position: t.position, id: t.id, text: t.text, logprob: t.logprob.map(Logprob::from) }
    }
}

impl Finished {
    pub(super) fn new(
        request: RequestId,
        attempt: u32,
        reason: Finish,
        text: String,
        usage: vocabulary::Usage,
    ) -> Self {
        Finished {
            request: request.0,
            attempt,
            reason: finish_number(reason),
            text,
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            output_tokens: usage.output_tokens,
            extensions: Vec::new(),
        }
    }
}

impl Failed {
    pub(super) fn new(request: RequestId, attempt: u32, failure: vocabulary::Failure) -> Self {
        let failure_kind = failure_number(failure.kind);
        Failed {
            request: request.0,
            attempt,
            failure: failure_kind,
            message: failure.message,
            extensions: Vec::new(),
        }
    }
}

impl From<vocabulary::Rates> for Rates {
    fn from(r: vocabulary::Rates) -> Self {
        Rates {
            prefill_tokens_per_s: r.prefill_tokens_per_s,
            token_time_alone_ns: nanos(r.token_time_alone),
            token_time_full_ns: nanos(r.token_time_full),
        }
    }
}

impl From<vocabulary::Status> for Status {
    fn from(s: vocabulary::Status) -> Self {
        let model = |m: vocabulary::ModelStatus| ModelStatus {
            model: m.model.0,
            alive: m.alive,
            running: m.running,
            waiting: m.waiting,
            queued_tokens: m.queued_tokens,
            kv_blocks_free: m.kv_blocks_free,
            steps: m.steps,
            rates: m.rates.map(Rates::from),
        };
        Status {
            draining: s.draining,
            models: s.models.into_iter().map(model).collect(),
            extensions: s.caches.into_iter().map(cache).chain(s.others.into_iter().map(others)).collect(),
        }
    }
}
