//! A request for tokens in the gateway: from its arrival until the last byte of its answer has been made.
use super::Telemetry;
use super::names::{self, Operation};
use super::span::{SAMPLED, Span, SpanKind, ago, new_id, new_trace};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};
use weir_scheduler::{FailureKind, TraceContext};

/// Status of what a client left before its end, as nginx counts it.
const LEFT: u16 = 499;

/// Counts a request, and makes its span when its last clone is dropped.
#[derive(Clone)]
pub struct Served(Arc<Open>);

struct Open {
    telemetry: Telemetry,
    route: &'static str,
    arrived: Instant,
    /// The client's; its span is our parent.
    parent: TraceContext,
    /// What is below has this for its parent; the client's, where no spans are made.
    context: TraceContext,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    about: Option<About>,
    first: Option<Instant>,
    input_tokens: u64,
    output_tokens: u64,
    /// Answers that are still to come.
    open: usize,
    error: Option<&'static str>,
    status: u16,
}

struct About {
    operation: Operation,
    provider: String,
    model: String,
    answers: usize,
    streams: bool,
}

impl Telemetry {
    /// A request has arrived; `parent` is what its client says of its trace.
    pub fn serve(&self, route: &'static str, parent: TraceContext) -> Served {
        let mut context = parent;
        if self.traces() {
            let trace = if parent.trace == 0 { new_trace() } else { parent.trace };
            let sampled = self.inner.sampler.takes(parent, trace);
            // Where it isn't recorded, what follows hears so, and that the client's span is its parent.
            let span = if sampled || parent.span == 0 { new_id() } else { parent.span };
            context = TraceContext { trace, span, flags: u8::from(sampled) };
        }
        let arrived = Instant::now();
        let state = Mutex::default();
        Served(Arc::new(Open { telemetry: self.clone(), route, arrived, parent, context, state }))
    }
}

impl Served {
    /// What its parts have for their trace.
    pub fn context(&self) -> TraceContext {
        self.0.context
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it asks for is known: so many answers by this model; `provider` is whose, where it isn't ours.
    pub fn about(
        &self,
        operation: Operation,
        provider: Option<&str>,
        model: &str,
        answers: usize,
        streams: bool,
    ) {
        let mut state = self.state();
        let provider = names::provider(provider.unwrap_or(names::OURS)).to_owned();
        state.open = answers;
        let about = About { operation, provider, model: model.to_owned(), answers, streams };
        self.0.telemetry.meters().active.add(&[operation.name(), &about.model], 1.0);
        state.about = Some(about);
    }

    /// The first token is here.
    pub fn first(&self) {
        self.state().first.get_or_insert_with(Instant::now);
    }

    /// One of its answers is whole.
    pub fn finished(&self, input_tokens: u32, output_tokens: u32) {
        let mut state = self.state();
        state.input_tokens = u64::from(input_tokens);
        state.output_tokens += u64::from(output_tokens);
        state.open = state.open.saturating_sub(1);
        if state.open == 0 && state.status == 0 {
            state.status = 200;
        }
    }

    /// One of its answers won't come.
    pub fn failed(&self, kind: FailureKind) {
        let mut state = self.state();
        state.error.get_or_insert(kind.word());
        if state.status == 0 && state.first.is_some() {
            // The status has long been sent.
            state.status = 200;
        }
    }

    /// It was refused, with this status and the API's word for why.
    pub fn refused(&self, status: u16, code: Option<&'static str>) {
        let mut state = self.state();
        state.status = status;
        state.error = state.error.or(code).or(Some("invalid"));
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let state = std::mem::take(self.state.get_mut().unwrap_or_else(PoisonError::into_inner));
        let left = state.status == 0 && state.error.is_none();
        let error = if left { Some("cancelled") } else { state.error };
        let status = match (left, state.status) {
            (true, _) => LEFT,
            (false, 0) => 500,
            (false, status) => status,
        };
        let took = self.arrived.elapsed();
        self.count(&state, error, status, took.as_secs_f64());
        if self.context.flags & SAMPLED != 0 && self.telemetry.traces() {
            self.telemetry.send(self.span(&state, error, status, SystemTime::now()));
        }
    }
}

impl Open {
    fn count(&self, state: &State, error: Option<&'static str>, status: u16, took: f64) {
        let meters = self.telemetry.meters();
        // Numbers of three digits.
        meters.responses.add(&[self.route, &status.to_string()], 1.0);
        let Some(About { operation, provider, model, .. }) = &state.about else { return };
        let operation = operation.name();
        meters.active.add(&[operation, model], -1.0);
        meters.server_duration.add(&[operation, provider, model, error.unwrap_or_default()], took);
        let Some(first) = state.first.filter(|_| error.is_none()) else { return };
        let to_first = first.duration_since(self.arrived).as_secs_f64();
        meters.server_first.add(&[operation, provider, model], to_first);
        if state.output_tokens > 1 {
            let pace = (took - to_first).max(0.0) / (state.output_tokens - 1) as f64;
            meters.server_pace.add(&[operation, provider, model], pace);
        }
    }

    fn span(&self, state: &State, error: Option<&'static str>, status: u16, now: SystemTime) -> Span {
        let mut attributes = vec![
            (names::METHOD, "POST".into()),
            (names::ROUTE, self.route.into()),
            (names::STATUS, u64::from(status).into()),
        ];
        if let Some(about) = &state.about {
            attributes.push((names::MODEL, about.model.as_str().into()));
            attributes.push((names::ANSWERS, (about.answers as u64).into()));
            attributes.push((names::STREAM, about.streams.into()));
        }
        if let Some(first) = state.first {
            attributes.push((names::TO_FIRST, first.duration_since(self.arrived).as_secs_f64().into()));
        }
        attributes.extend(error.map(|error| (names::ERROR, error.into())));
        Span {
            trace: self.context.trace,
            id: self.context.span,
            parent: self.parent.span,
            flags: self.context.flags,
            name: format!("POST {}", self.route),
            kind: SpanKind::Server,
            start: ago(now, self.arrived.elapsed()),
            end: now,
            attributes,
            events: Vec::new(),
            failed: error.is_some(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{gather, render};
    use super::*;

    fn told(telemetry: &Telemetry) -> String {
        render(&gather::counted(telemetry))
    }

    #[test]
    fn requests_are_counted_however_they_end() {
        let telemetry = Telemetry::default();
        let serve = || telemetry.serve("/v1/chat/completions", TraceContext::default());
        let good = serve();
        good.about(Operation::Chat, None, "m", 2, true);
        assert!(
            told(&telemetry).contains(
                "weir_requests_active{gen_ai_operation_name=\"chat\",gen_ai_request_model=\"m\"} 1"
            )
        );
        good.first();
        good.finished(5, 10);
        good.finished(5, 10);
        drop(good);
        let left = serve();
        left.about(Operation::Chat, Some("mistral"), "m", 1, true);
        drop(left);
        let refused = serve();
        refused.clone().refused(400, Some("invalid_json"));
        drop(refused);
        let broken = serve();
        broken.about(Operation::TextCompletion, None, "m", 1, true);
        broken.first();
        broken.failed(FailureKind::Internal);
        drop(broken);
        let text = told(&telemetry);
        let check = |line: &str| assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        check("weir_responses_total{route=\"/v1/chat/completions\",status=\"200\"} 2");
        check("weir_responses_total{route=\"/v1/chat/completions\",status=\"400\"} 1");
        check("weir_responses_total{route=\"/v1/chat/completions\",status=\"499\"} 1");
        check(
            "gen_ai_server_request_duration_seconds_count{gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"weir\",gen_ai_request_model=\"m\"} 1",
        );
        check(
            "gen_ai_server_request_duration_seconds_count{gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"mistral_ai\",gen_ai_request_model=\"m\",error_type=\"cancelled\"} 1",
        );
        check(
            "gen_ai_server_request_duration_seconds_count{gen_ai_operation_name=\"text_completion\",gen_ai_provider_name=\"weir\",gen_ai_request_model=\"m\",error_type=\"internal\"} 1",
        );
        check(
            "gen_ai_server_time_per_output_token_seconds_count{gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"weir\",gen_ai_request_model=\"m\"} 1",
        );
        check("weir_requests_active{gen_ai_operation_name=\"chat\",gen_ai_request_model=\"m\"} 0");
    }
}
