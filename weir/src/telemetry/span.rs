//! Spans, and which traces have any.
use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use weir_scheduler::TraceContext;

/// Bit of the flags: the trace is recorded.
pub(super) const SAMPLED: u8 = 1;

/// A span that has ended.
#[derive(Clone, Debug)]
pub(super) struct Span {
    pub trace: u128,
    pub id: u64,
    /// 0 where there is none.
    pub parent: u64,
    pub flags: u8,
    pub name: String,
    pub kind: SpanKind,
    pub start: SystemTime,
    pub end: SystemTime,
    pub attributes: Attributes,
    pub events: Vec<SpanEvent>,
    /// It went wrong. Why is an attribute: a message could say more than it should.
    pub failed: bool,
}

/// By the protocol's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SpanKind {
    Internal = 1,
    Server = 2,
    Client = 3,
}

#[derive(Clone, Debug)]
pub(super) struct SpanEvent {
    pub at: SystemTime,
    pub name: &'static str,
    pub attributes: Attributes,
}

pub(super) type Attributes = Vec<(&'static str, Attribute)>;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Attribute {
    Text(String),
    Texts(Vec<String>),
    Int(i64),
    Float(f64),
    Bool(bool),
}

impl From<&str> for Attribute {
    fn from(text: &str) -> Attribute {
        Attribute::Text(text.to_owned())
    }
}

impl From<u32> for Attribute {
    fn from(number: u32) -> Attribute {
        Attribute::Int(number.into())
    }
}

impl From<u64> for Attribute {
    fn from(number: u64) -> Attribute {
        Attribute::Int(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<f64> for Attribute {
    fn from(number: f64) -> Attribute {
        Attribute::Float(number)
    }
}

impl From<bool> for Attribute {
    fn from(bool: bool) -> Attribute {
        Attribute::Bool(bool)
    }
}

/// Which traces are recorded, as OpenTelemetry's `OTEL_TRACES_SAMPLER` says it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// What a client's `traceparent` says counts.
    parent_based: bool,
    /// Of traces, else.
    ratio: f64,
}

impl Default for Sampler {
    fn default() -> Sampler {
        Sampler { parent_based: true, ratio: 1.0 }
    }
}

impl Sampler {
    /// `always_on`, `always_off`, `traceidratio`, and the same with `parentbased_` before it; `argument` is the ratio. None
    /// where it is none of them.
    pub fn named(name: &str, argument: Option<&str>) -> Option<Sampler> {
        let (parent_based, kind) = match name.strip_prefix("parentbased_") {
            Some(kind) => (true, kind),
            None => (false, name),
        };
        let ratio = match kind {
            "always_on" => 1.0,
            "always_off" => 0.0,
            "traceidratio" => argument.map_or(Some(1.0), |a| a.trim().parse::<f64>().ok())?,
            _ => return None,
        };
        (0.0..=1.0).contains(&ratio).then_some(Sampler { parent_based, ratio })
    }

    pub(super) fn takes(self, parent: TraceContext, trace: u128) -> bool {
        if self.parent_based && parent.trace != 0 {
            return parent.flags & SAMPLED != 0;
        }
        // By the low half, which is random.
        ((trace as u64) as f64) < self.ratio * (u64::MAX as f64) || self.ratio >= 1.0
    }
}

/// A new span's or half a trace's number: not 0, and nobody else's.
pub(super) fn new_id() -> u64 {
    static SEEDS: OnceLock<(u64, u64)> = OnceLock::new();
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // The standard library's hash keys are the system's randomness.
    let (start, mask) =
        *SEEDS.get_or_init(|| (RandomState::new().hash_one(0), RandomState::new().hash_one(1)));
    let count = NEXT.fetch_add(1, Ordering::Relaxed);
    // SplitMix64, which gives each number once.
    let mut z = start.wrapping_add(count.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) ^ mask).max(1)
}

pub(super) fn new_trace() -> u128 {
    u128::from(new_id()) << 64 | u128::from(new_id())
}

/// What a request to somebody else carries so that its spans belong to this trace: W3C's `traceparent`; none where there
/// is no trace.
pub fn traceparent(context: TraceContext) -> Option<String> {
    let TraceContext { trace, span, flags } = context;
    (trace != 0 && span != 0).then(|| format!("00-{trace:032x}-{span:016x}-{flags:02x}"))
}

/// When something was that is now so long ago.
pub(super) fn ago(now: SystemTime, elapsed: Duration) -> SystemTime {
    now.checked_sub(elapsed).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn ids_are_nobody_elses() {
        let ids: HashSet<u64> = (0..100_000).map(|_| new_id()).collect();
        assert_eq!((ids.len(), ids.contains(&0)), (100_000, false));
        assert_ne!(new_trace() >> 64, 0);
    }

    #[test]
    fn samplers_do_as_their_names_say() {
        let parent = |flags| TraceContext { trace: 7, span: 8, flags };
        let check = |name, argument, expected: Option<[bool; 3]>| {
            let sampler = Sampler::named(name, argument);
            let takes = sampler
                .map(|s| [s.takes(TraceContext::default(), 1), s.takes(parent(0), 7), s.takes(parent(1), 7)]);
            assert_eq!(takes, expected, "{name} {argument:?}");
        };
        check("always_on", None, Some([true; 3]));
        check("always_off", None, Some([false; 3]));
        check("parentbased_always_on", None, Some([true, false, true]));
        check("parentbased_always_off", None, Some([false, false, true]));
        check("parentbased_traceidratio", Some("0"), Some([false, false, true]));
        check("traceidratio", Some("2"), None);
        check("jaeger_remote", None, None);
        let half = Sampler::named("traceidratio", Some("0.5")).unwrap();
        let taken = (0..10_000).filter(|_| half.takes(TraceContext::default(), new_trace())).count();
        assert!((4500..5500).contains(&taken), "{taken}");
    }

    #[test]
    fn trace_contexts_are_written_as_w3c_says() {
        let context = TraceContext { trace: 0x0af7, span: 0xb7ad, flags: 1 };
        let expected = "00-00000000000000000000000000000af7-000000000000b7ad-01";
        assert_eq!(traceparent(context).as_deref(), Some(expected));
        assert_eq!(traceparent(TraceContext::default()), None);
    }
}
