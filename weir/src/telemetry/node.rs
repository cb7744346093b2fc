//! What a node did for an attempt: its own span and its device's, in the trace that came with the frame.
use super::Telemetry;
use super::names;
use super::span::{Attributes, SAMPLED, Span, SpanKind, ago, new_id};
use std::time::{Duration, SystemTime};
use weir_node::{Ran, Watch};
use weir_scheduler::FailureKind;

/// Makes spans of what a node ran.
#[derive(Clone, Debug)]
pub struct Watcher(Telemetry);

impl Watcher {
    /// Which leave by this way.
    pub fn new(telemetry: &Telemetry) -> Watcher {
        Watcher(telemetry.clone())
    }
}

impl Watch for Watcher {
    fn ran(&self, ran: &Ran<'_>) {
        if !self.0.traces() || ran.trace.flags & SAMPLED == 0 || ran.trace.trace == 0 {
            return;
        }
        let now = SystemTime::now();
        let error = ran.failed.map(FailureKind::word).or((!ran.ended).then_some("cancelled"));
        let mut attributes: Attributes = vec![
            (names::NODE, ran.node.into()),
            (names::MODEL, ran.model.into()),
            (names::ATTEMPT, ran.attempt.into()),
            (names::TOKENS_MADE, ran.tokens.into()),
            (names::BESIDE, ran.beside.into()),
        ];
        attributes.extend(error.map(|error| (names::ERROR, error.into())));
        let span = |name: &str, parent, from: Duration, to: Duration| Span {
            trace: ran.trace.trace,
            id: new_id(),
            parent,
            flags: ran.trace.flags,
            name: name.to_owned(),
            kind: SpanKind::Internal,
            start: ago(now, ran.took.saturating_sub(from)),
            end: ago(now, ran.took.saturating_sub(to)),
            attributes: vec![(names::DEVICE, ran.device.into()), (names::NUMERICS, ran.numerics.into())],
            events: Vec::new(),
            failed: false,
        };
        let failed = error.is_some_and(|error| error != "cancelled");
        let whole = Span {
            kind: SpanKind::Server,
            attributes,
            failed,
            ..span(names::SPAN_NODE, ran.trace.span, Duration::ZERO, ran.took)
        };
        if let Some(first) = ran.first {
            self.0.send(span(names::SPAN_PREFILL, whole.id, Duration::ZERO, first));
            if let Some(last) = ran.last.filter(|last| *last > first) {
                self.0.send(span(names::SPAN_DECODE, whole.id, first, last));
            }
        }
        self.0.send(whole);
    }
}
