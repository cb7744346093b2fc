//! A request on its way through the scheduler: what was decided, and what became of each attempt.
use super::Telemetry;
use super::names::{self, Operation};
use super::span::{Attribute, Attributes, SAMPLED, Span, SpanEvent, SpanKind, ago, new_id};
use crate::driver::ServedModel;
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use weir_scheduler::{FailureKind, Finish, Generate, Priority, TraceContext, Usage};

/// Events of one request that are kept, at most: a request may wait, be refused and try again for long.
const EVENTS_MAX: usize = 64;
/// Attempts of it that are remembered after their end, at most.
const ATTEMPTS_MAX: usize = 64;

/// Follows a request; the conductor tells it what happens. It is over when it is dropped.
pub struct Trail {
    telemetry: Telemetry,
    operation: Operation,
    model: Option<Arc<ServedModel>>,
    began: Instant,
    /// Whose child it is, and the trace.
    parent: TraceContext,
    /// None where no spans are made.
    traced: Option<Traced>,
    attempts: Vec<Attempt>,
    attempts_total: u32,
    nano_usd: u64,
    priority: Priority,
    ended: Option<Result<(), &'static str>>,
}

/// Why an attempt ended well, and what it took.
type End<'a> = (Finish, &'a Usage);

struct Traced {
    id: u64,
    events: Vec<SpanEvent>,
}

/// To whom an attempt goes.
pub struct Whither {
    /// The node's name.
    pub node: Arc<str>,
    /// The model there, as requests call it; at a provider its own name for it.
    pub model: String,
    /// Whose, where it isn't a node of ours.
    pub upstream: Option<Whose>,
}

/// An upstream, as an attempt needs it.
pub struct Whose {
    /// Its name here.
    pub name: String,
    /// Its address.
    pub url: String,
    /// It is a company's.
    pub foreign: bool,
}

struct Attempt {
    number: u32,
    whither: Whither,
    sent: Instant,
    span: u64,
    /// Tokens of output that it began with, and those that it made.
    given: u32,
    tokens: u32,
    first: Option<Instant>,
    max_tokens: u32,
    sampling: (f32, f32, u32),
    /// What it cost may yet come.
    over: bool,
    /// It was given up, for what is known only when it goes on elsewhere.
    left: bool,
}

impl Telemetry {
    /// A request for `model` is on its way, within this trace.
    pub fn follow(&self, ask: &Generate, operation: Operation, model: Option<Arc<ServedModel>>) -> Trail {
        let parent = ask.trace;
        let wanted = self.traces() && parent.flags & SAMPLED != 0 && parent.trace != 0;
        Trail {
            telemetry: self.clone(),
            operation,
            model,
            began: Instant::now(),
            parent,
            traced: wanted.then(|| Traced { id: new_id(), events: Vec::new() }),
            attempts: Vec::new(),
            attempts_total: 0,
            nano_usd: 0,
            priority: ask.priority,
            ended: None,
        }
    }
}

impl Trail {
    fn event(&mut self, name: &'static str, attributes: impl FnOnce() -> Attributes) {
        if let Some(traced) = self.traced.as_mut().filter(|traced| traced.events.len() < EVENTS_MAX) {
            traced.events.push(SpanEvent { at: SystemTime::now(), name, attributes: attributes() });
        }
    }

    /// It is given to a node. What the node and whoever is behind it do belongs to the attempt's span.
    pub fn placed(&mut self, ask: &mut Generate, whither: Whither) {
        let foreign = whither.upstream.as_ref().is_some_and(|upstream| upstream.foreign);
        let kind = match () {
            () if self.attempts.iter().any(|attempt| !attempt.over) => names::HEDGED,
            () if self.attempts_total > 0 || !ask.output.is_empty() => names::RESUMED,
            () if foreign && !self.model.as_ref().is_some_and(|model| model.is_foreign()) => names::SPILLED,
            () => names::PLACED,
        };
        let meters = self.telemetry.meters();
        meters.placements.add(&[&whither.node, kind.trim_start_matches("weir.")], 1.0);
        if kind == names::HEDGED {
            meters.hedges.add(&[], 1.0);
        }
        if let Some(last) = self.attempts.last().filter(|last| kind == names::RESUMED && last.left) {
            // From a node that fell silent, stalled or drains.
            meters.failovers.add(&[&last.whither.node, "moved"], 1.0);
        }
        let (attempt, given) = (ask.attempt, u32::try_from(ask.output.len()).unwrap_or(u32::MAX));
        let node = whither.node.clone();
        self.event(kind, || {
            vec![
                (names::NODE, (*node).into()),
                (names::ATTEMPT, attempt.into()),
                (names::GIVEN, given.into()),
            ]
        });
        let span = if self.traced.is_some() { new_id() } else { self.parent.span };
        ask.trace = TraceContext { span, ..self.parent };
        if self.attempts.len() >= ATTEMPTS_MAX {
            self.attempts.remove(0);
        }
        let s = &ask.sampling;
        self.attempts.push(Attempt {
            number: attempt,
            whither,
            sent: Instant::now(),
            span,
            given,
            tokens: 0,
            first: None,
            max_tokens: ask.max_tokens,
            sampling: (s.temperature, s.top_p, s.top_k),
            over: false,
            left: false,
        });
        self.attempts_total += 1;
    }

    /// Tokens came of an attempt.
    pub fn tokens(&mut self, attempt: u32, count: u32) {
        if let Some(attempt) = self.attempts.iter_mut().find(|a| a.number == attempt) {
            attempt.first.get_or_insert_with(Instant::now);
            attempt.tokens += count;
        }
    }

    /// A node failed it.
    pub fn attempt_failed(&mut self, attempt: u32, kind: FailureKind) {
        self.over(attempt, Err(kind.word()), None);
    }

    /// An attempt's stream broke.
    pub fn attempt_broke(&mut self, attempt: u32) {
        self.over(attempt, Err("broken"), None);
    }

    /// A node was lost.
    pub fn lost(&mut self, node: &str) {
        let gone: Vec<u32> =
            self.attempts.iter().filter(|a| !a.over && *a.whither.node == *node).map(|a| a.number).collect();
        gone.into_iter().for_each(|attempt| self.over(attempt, Err("node_lost"), None));
    }

    /// An attempt is not wanted any more: it goes on elsewhere, another was faster, or the client is gone.
    pub fn left(&mut self, attempt: u32) {
        self.over(attempt, Ok(false), None);
    }

    /// What an attempt cost.
    pub fn spent(&mut self, attempt: u32, nano_usd: u64) {
        self.nano_usd = self.nano_usd.saturating_add(nano_usd);
        let attempt = self.attempts.iter().find(|a| a.number == attempt);
        let (provider, model) = attempt.map_or((names::OURS, ""), |a| (a.provider(), &a.whither.model));
        self.telemetry.meters().spent.add(&[provider, model], nano_usd as f64 / 1e9);
    }

    /// The node of this name, or else the last that is still at it, has answered.
    pub fn finished(&mut self, node: Option<&str>, reason: Finish, usage: &Usage) {
        let open = || self.attempts.iter().filter(|a| !a.over);
        let by_node = node.and_then(|node| open().find(|a| *a.whither.node == *node));
        if let Some(attempt) = by_node.or(open().next_back()).map(|a| a.number) {
            self.over(attempt, Ok(true), Some((reason, usage)));
        }
        self.ended = Some(Ok(()));
    }

    /// It ends without an answer.
    pub fn refused(&mut self, kind: FailureKind) {
        let why = kind.word();
        self.telemetry.meters().refusals.add(&[why], 1.0);
        self.event(names::REFUSED, || vec![(names::ERROR, why.into())]);
        self.ended = Some(Err(why));
    }

    /// An attempt is over: it was answered (true) or given up (false), or went wrong.
    fn over(&mut self, number: u32, how: Result<bool, &'static str>, end: Option<End<'_>>) {
        let Some(at) = self.attempts.iter().position(|a| a.number == number && !a.over) else { return };
        (self.attempts[at].over, self.attempts[at].left) = (true, how == Ok(false));
        let node = self.attempts[at].whither.node.clone();
        match how {
            Err(why) => {
                self.telemetry.meters().failovers.add(&[&node, why], 1.0);
                self.event(names::ATTEMPT_FAILED, || {
                    vec![
                        (names::NODE, (*node).into()),
                        (names::ATTEMPT, number.into()),
                        (names::ERROR, why.into()),
                    ]
                });
            }
            Ok(false) => self.event(names::ATTEMPT_LEFT, || {
                vec![(names::NODE, (*node).into()), (names::ATTEMPT, number.into())]
            }),
            Ok(true) => {}
        }
        let error = match how {
            Ok(true) => None,
            Ok(false) => Some("cancelled"),
            Err(why) => Some(why),
        };
        let attempt = &self.attempts[at];
        self.count(attempt, error, end.map(|(_, usage)| usage));
        if let Some(traced) = &self.traced {
            self.telemetry.send(self.attempt_span(attempt, traced.id, error, end));
        }
    }

    fn count(&self, attempt: &Attempt, error: Option<&'static str>, usage: Option<&Usage>) {
        let meters = self.telemetry.meters();
        let (operation, provider) = (self.operation.name(), attempt.provider());
        let model = attempt.whither.model.as_str();
        let took = attempt.sent.elapsed().as_secs_f64();
        meters.client_duration.add(&[operation, provider, model, error.unwrap_or_default()], took);
        if let Some(usage) = usage {
            let (input, output) = attempt.used(usage);
            meters.client_tokens.add(&[operation, provider, model, "input"], f64::from(input));
            meters.client_tokens.add(&[operation, provider, model, "output"], f64::from(output));
        }
    }

    /// `chat MODEL`: a call of a node or of a provider.
    fn attempt_span(
        &self,
        attempt: &Attempt,
        parent: u64,
        error: Option<&'static str>,
        end: Option<End<'_>>,
    ) -> Span {
        let (now, conventions) = (SystemTime::now(), self.telemetry.inner.conventions);
        let (operation, model) = (self.operation.name(), attempt.whither.model.as_str());
        let (temperature, top_p, top_k) = attempt.sampling;
        let mut attributes: Attributes = vec![
            (names::OPERATION, operation.into()),
            (names::REQUEST_MODEL, model.into()),
            (names::MAX_TOKENS, attempt.max_tokens.into()),
            (names::TEMPERATURE, f64::from(temperature).into()),
            (names::TOP_P, f64::from(top_p).into()),
            (names::TOP_K, f64::from(top_k).into()),
            (names::NODE, (*attempt.whither.node).into()),
            (names::ATTEMPT, attempt.number.into()),
            (names::GIVEN, attempt.given.into()),
        ];
        attributes.extend(conventions.provider().iter().map(|name| (*name, attempt.provider().into())));
        if let Some(upstream) = &attempt.whither.upstream
            && let Some(address) = weir_upstream::Address::parse(&upstream.url)
        {
            attributes.push((names::SERVER_ADDRESS, address.host.as_str().into()));
            attributes.push((names::SERVER_PORT, u32::from(address.port).into()));
        }
        if let Some((reason, usage)) = end {
            let (input, output) = attempt.used(usage);
            let word = match reason {
                Finish::Stop => "stop",
                Finish::Length => "length",
            };
            attributes.push((names::FINISH_REASONS, Attribute::Texts(vec![word.to_owned()])));
            attributes.push((names::RESPONSE_MODEL, model.into()));
            attributes.push((names::INPUT_TOKENS, input.into()));
            attributes.push((names::OUTPUT_TOKENS, output.into()));
            if conventions.is_new() {
                attributes.push((names::CACHED_TOKENS, usage.cached_tokens.into()));
            }
        } else if attempt.tokens > 0 {
            attributes.push((names::OUTPUT_TOKENS, attempt.tokens.into()));
        }
        if let Some(first) = attempt.first.filter(|_| conventions.is_new()) {
            attributes.push((names::FIRST_CHUNK, first.duration_since(attempt.sent).as_secs_f64().into()));
        }
        attributes.extend(error.map(|error| (names::ERROR, error.into())));
        Span {
            trace: self.parent.trace,
            id: attempt.span,
            parent,
            flags: self.parent.flags,
            name: format!("{operation} {model}"),
            kind: SpanKind::Client,
            start: ago(now, attempt.sent.elapsed()),
            end: now,
            attributes,
            events: Vec::new(),
            failed: error.is_some_and(|error| error != "cancelled"),
        }
    }
}

impl Attempt {
    fn provider(&self) -> &str {
        names::provider(self.whither.upstream.as_ref().map_or(names::OURS, |upstream| &upstream.name))
    }

    /// Tokens in and out of this attempt: output that it began with was input to it.
    fn used(&self, usage: &Usage) -> (u32, u32) {
        let input = usage.prompt_tokens.saturating_add(self.given);
        (input, usage.output_tokens.saturating_sub(self.given))
    }
}

impl Drop for Trail {
    fn drop(&mut self) {
        let open: Vec<u32> = self.attempts.iter().filter(|a| !a.over).map(|a| a.number).collect();
        open.into_iter().for_each(|attempt| self.left(attempt));
        let Some(traced) = self.traced.take() else { return };
        let now = SystemTime::now();
        let error = match self.ended {
            Some(Ok(())) => None,
            Some(Err(why)) => Some(why),
            None => Some("cancelled"),
        };
        let priority = match self.priority {
            Priority::Background => "background",
            Priority::Normal => "normal",
            Priority::Interactive => "interactive",
        };
        let mut attributes: Attributes =
            vec![(names::PRIORITY, priority.into()), (names::ATTEMPTS, self.attempts_total.into())];
        if let Some(model) = &self.model {
            attributes.push((names::MODEL, model.name.as_str().into()));
        }
        if self.nano_usd > 0 {
            attributes.push((names::COST, (self.nano_usd as f64 / 1e9).into()));
        }
        attributes.extend(error.map(|error| (names::ERROR, error.into())));
        self.telemetry.send(Span {
            trace: self.parent.trace,
            id: traced.id,
            parent: self.parent.span,
            flags: self.parent.flags,
            name: names::SPAN_SCHEDULE.into(),
            kind: SpanKind::Internal,
            start: ago(now, self.began.elapsed()),
            end: now,
            attributes,
            events: traced.events,
            failed: error.is_some_and(|error| error != "cancelled"),
        });
    }
}
