//! From validated archives to the vocabulary. What makes no sense is refused here, once.
use super::body::{
    ArchivedCandidate, ArchivedExtension, ArchivedFailed, ArchivedFinished, ArchivedGenerate, ArchivedRates,
    ArchivedSampling, ArchivedStatus, ArchivedToken, CACHE, GRAMMAR, OTHERS, failure_number, finish_number,
    priority_number,
};
use super::{FrameError, Kind};
use std::sync::Arc;
use std::time::Duration;
use weir_scheduler::{
    BlockKey, CacheStatus, Candidate, Event, Failure, FailureKind, Finish, GRAMMAR_BYTES_MAX, Generate,
    KeyId, Logprob, ModelId, ModelStatus, PREFIXES_MAX, Priority, Rates, RequestId, Sampling, Status, Token,
    TraceContext, Usage,
};

type Result<T> = std::result::Result<T, FrameError>;

/// What must be understood is one of the extensions that this program knows.
fn extensions(kind: Kind, all: &[ArchivedExtension], known: &[u16]) -> Result<()> {
    let why = "it has an extension that must be understood and isn't; update this program";
    let understood = |e: &ArchivedExtension| !e.must || known.contains(&e.number.to_native());
    sense(kind, all.iter().all(understood), why)
}

fn grammar(all: &[ArchivedExtension]) -> Result<Option<Arc<str>>> {
    let Some(told) = all.iter().find(|extension| extension.number.to_native() == GRAMMAR) else {
        return Ok(None);
    };
    let why = "its grammar is not text, or too long";
    let wrong = FrameError::Senseless { kind: Kind::Generate, why };
    let fits = told.value.len() <= GRAMMAR_BYTES_MAX;
    let text = std::str::from_utf8(told.value.as_slice()).ok().filter(|text| fits && !text.is_empty());
    text.map(|text| Some(text.into())).ok_or(wrong)
}

pub(super) fn sense(kind: Kind, holds: bool, why: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(FrameError::Senseless { kind, why }) }
}

/// The one of `all` with this number.
fn named<T: Copy>(kind: Kind, all: &[T], number: fn(T) -> u8, wanted: u8, why: &'static str) -> Result<T> {
    all.iter().copied().find(|one| number(*one) == wanted).ok_or(FrameError::Senseless { kind, why })
}

fn sampling(s: &ArchivedSampling) -> Result<Sampling> {
    let made = Sampling {
        temperature: s.temperature.into(),
        top_k: s.top_k.into(),
        top_p: s.top_p.into(),
        min_p: s.min_p.into(),
        repetition_penalty: s.repetition_penalty.into(),
        frequency_penalty: s.frequency_penalty.into(),
        presence_penalty: s.presence_penalty.into(),
        seed: s.seed.into(),
        logit_bias: s.logit_bias.iter().map(|pair| (pair.0.into(), pair.1.into())).collect(),
        logprobs: s.logprobs.as_ref().copied(),
    };
    let within = |value: f32, low: f32, high: f32| (low..=high).contains(&value);
    let holds = within(made.temperature, 0.0, 100.0)
        && within(made.top_p, f32::MIN_POSITIVE, 1.0)
        && within(made.min_p, 0.0, 1.0)
        && within(made.repetition_penalty, f32::MIN_POSITIVE, 100.0)
        && within(made.frequency_penalty, -100.0, 100.0)
        && within(made.presence_penalty, -100.0, 100.0)
        && made.logit_bias.iter().all(|(_, bias)| within(*bias, -100.0, 100.0))
        && made.logprobs.is_none_or(|n| n <= 20);
    sense(Kind::Generate, holds, "a sampling parameter is out of range")?;
    Ok(made)
}

pub(super) fn generate(g: &ArchivedGenerate) -> Result<Generate> {
    const KIND: Kind = Kind::Generate;
    let priorities = [Priority::Background, Priority::Normal, Priority::Interactive];
    extensions(KIND, &g.extensions, &[GRAMMAR])?;
    sense(KIND, !g.prompt.is_empty(), "the prompt is empty")?;
    sense(KIND, g.max_tokens.to_native() > 0, "max_tokens is 0")?;
    sense(KIND, g.stop.iter().all(|stop| !stop.is_empty()), "a stop string is empty")?;
    Ok(Generate {
        request: RequestId(g.request.into()),
        attempt: g.attempt.into(),
        model: ModelId(g.model),
        prompt: g.prompt.iter().map(|id| id.to_native()).collect(),
        output: g.output.iter().map(|id| id.to_native()).collect(),
        sampling: sampling(&g.sampling)?,
        max_tokens: g.max_tokens.into(),
        stop: g.stop.iter().map(|stop| stop.as_str().to_owned()).collect(),
        ignore_eos: g.ignore_eos,
        grammar: grammar(&g.extensions)?,
        priority: named(KIND, &priorities, priority_number, g.priority, "no such priority")?,
        deadline: g.deadline_ns.as_ref().map(|ns| Duration::from_nanos(ns.to_native())),
        ttft: None,
        max_cost: None,
        otherwise: Vec::new(),
        salt: g.salt.into(),
        key: KeyId(g.key.into()),
        tags: g.tags.iter().map(|pair| (pair.0.as_str().to_owned(), pair.1.as_str().to_owned())).collect(),
        trace: TraceContext { trace: g.trace.into(), span: g.span.into(), flags: g.trace_flags },
    })
}

fn candidate(c: &ArchivedCandidate) -> Candidate {
    Candidate { id: c.id.into(), logprob: c.logprob.into(), bytes: c.bytes.as_slice().to_vec() }
}

pub(super) fn token(t: &ArchivedToken) -> Token {
    Token {
        position: t.position.into(),
        id: t.id.into(),
        text: t.text.as_str().to_owned(),
        logprob: t
            .logprob
            .as_ref()
            .map(|l| Logprob { chosen: candidate(&l.chosen), top: l.top.iter().map(candidate).collect() }),
    }
}

pub(super) fn finished(f: &ArchivedFinished) -> Result<Event> {
    extensions(Kind::Finished, &f.extensions, &[])?;
    let reasons = [Finish::Stop, Finish::Length];
    Ok(Event::Finished {
        reason: named(Kind::Finished, &reasons, finish_number, f.reason, "no such reason")?,
        text: f.text.as_str().to_owned(),
        usage: Usage {
            prompt_tokens: f.prompt_tokens.into(),
            cached_tokens: f.cached_tokens.into(),
            output_tokens: f.output_tokens.into(),
        },
    })
}

pub(super) fn failure(f: &ArchivedFailed) -> Result<Failure> {
    extensions(Kind::Failed, &f.extensions, &[])?;
    let kinds = [
        FailureKind::Invalid,
        FailureKind::NoModel,
        FailureKind::Busy,
        FailureKind::Deadline,
        FailureKind::Cancelled,
        FailureKind::Internal,
    ];
    let kind = named(Kind::Failed, &kinds, failure_number, f.failure, "no such failure")?;
    Ok(Failure { kind, message: f.message.as_str().to_owned() })
}

fn rates(kind: Kind, r: &ArchivedRates) -> Result<Rates> {
    let prefill_tokens_per_s: f32 = r.prefill_tokens_per_s.into();
    sense(kind, prefill_tokens_per_s.is_finite() && prefill_tokens_per_s > 0.0, "a rate is not above 0")?;
    Ok(Rates {
        prefill_tokens_per_s,
        token_time_alone: Duration::from_nanos(r.token_time_alone_ns.into()),
        token_time_full: Duration::from_nanos(r.token_time_full_ns.into()),
    })
}

const CACHE_WRONG: &str = "what it says of a cache is cut off or too long";

fn cache(value: &[u8]) -> Option<CacheStatus> {
    let (model, rest) = value.split_first_chunk::<32>()?;
    let (new, rest) = rest.split_first_chunk::<4>()?;
    let (keys, left) = rest.as_chunks::<16>();
    let new = usize::try_from(u32::from_le_bytes(*new)).ok()?;
    let holds = left.is_empty() && new <= keys.len() && keys.len() <= PREFIXES_MAX;
    let named = |keys: &[[u8; 16]]| keys.iter().map(|key| BlockKey(*key)).collect();
    holds.then(|| CacheStatus { model: ModelId(*model), new: named(&keys[..new]), gone: named(&keys[new..]) })
}

fn others(value: &[u8]) -> Option<(ModelId, u32)> {
    let (model, rest) = value.split_first_chunk::<32>()?;
    Some((ModelId(*model), u32::from_le_bytes(rest.try_into().ok()?)))
}

pub(super) fn status(s: &ArchivedStatus) -> Result<Status> {
    extensions(Kind::Status, &s.extensions, &[CACHE, OTHERS])?;
    let models = s.models.iter().map(|m| {
        Ok(ModelStatus {
            model: ModelId(m.model),
            alive: m.alive,
            running: m.running.into(),
            waiting: m.waiting.into(),
            queued_tokens: m.queued_tokens.into(),
            kv_blocks_free: m.kv_blocks_free.into(),
            steps: m.steps.into(),
            rates: m.rates.as_ref().map(|r| rates(Kind::Status, r)).transpose()?,
        })
    });
    let told = s.extensions.iter().filter(|extension| extension.number.to_native() == CACHE);
    let caches = told.map(|extension| cache(extension.value.as_slice()));
    let caches =
        caches.map(|cache| cache.ok_or(FrameError::Senseless { kind: Kind::Status, why: CACHE_WRONG }));
    let told = s.extensions.iter().filter(|extension| extension.number.to_native() == OTHERS);
    let others = told.map(|extension| {
        let why = "what it says of other schedulers is cut off or too long";
        others(extension.value.as_slice()).ok_or(FrameError::Senseless { kind: Kind::Status, why })
    });
    Ok(Status {
        draining: s.draining,
        models: models.collect::<Result<_>>()?,
        caches: caches.collect::<Result<_>>()?,
        others: others.collect::<Result<_>>()?,
    })
}
