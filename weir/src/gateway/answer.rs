//! From a request's body to its answer, streamed or whole.
use super::Shared;
use super::body::Body;
use super::caller::Caller;
use super::error::ApiError;
use super::grammar;
use super::models;
use super::parts::{Gathered, Next};
use super::prompt::{self, Encoded};
use super::request::{Api, Request, choice_seed};
use super::running::{Running, Total};
use super::stats::Counted;
use super::stream::{Ends, EventStream, backstop};
use super::write::{Label, Writer};
use crate::driver::{Ask, Generation, ServedModel, Source};
use crate::telemetry::Served;
use bytes::BytesMut;
use hyper::Response;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until};
use weir_scheduler::{KeyId, ModelId, RequestId, Sampling, TraceContext};

/// A streamed answer begins with its first event, so that a failure before it has its own status; but no later than
/// this, since clients wait for the head.
const FIRST_EVENT_WAIT: Duration = Duration::from_secs(10);
/// Longer bodies are parsed and tokenized off the threads that serve connections.
const INLINE_BYTES: usize = 32 << 10;

/// One call of `/v1/chat/completions` or `/v1/completions`.
pub(super) struct Call<'a> {
    pub(super) api: Api,
    /// Unique, part of the answer's id.
    pub(super) name: &'a str,
    pub(super) body: Vec<u8>,
    /// Its part in the telemetry, and in the trace.
    pub(super) served: Served,
    /// Held until the answer has been sent.
    pub(super) permit: OwnedSemaphorePermit,
    pub(super) caller: Caller,
}

/// Answers a call.
pub(super) async fn generate(shared: &Arc<Shared>, call: Call<'_>) -> Result<Response<Body>, ApiError> {
    let (arrived, deadline) = (Instant::now(), backstop(&shared.limits));
    let Call { api, name, body, served, permit, caller } = call;
    let body = Arc::new(body);
    let (request, prompts) = match prepare(shared, api, &body, None).await {
        // Perhaps a node can load it, or it is a class of models.
        Err(error) if error.is_no_model() => {
            let Some(wanted) = models::wanted(shared, &body) else { return Err(error) };
            let model = tokio::select! {
                model = shared.driver.bring(wanted) => model?,
                () = shared.cut() => return Err(ApiError::shutting_down()),
            };
            prepare(shared, api, &body, Some(model)).await?
        }
        prepared => prepared?,
    };
    grammar::check_all(&prompts).await?;
    let first_by = request.ttft.map(|ttft| arrived + ttft);
    let provider = match &request.model.source {
        Source::Upstream { provider, .. } => Some(&**provider),
        Source::Nodes { .. } => None,
    };
    let answers = prompts.len() * request.n;
    served.about(api.operation(), provider, &request.model.name, answers, request.stream);
    let generations = start(shared, &request, &prompts, served.context(), &caller).await?;
    let counted = Counted::new(&shared.stats, request.priority, arrived).told(served);
    let running = Running::new(generations, first_by, counted);
    let running = running.voiced(prompt::voices(&prompts, request.n));
    let id = match api {
        Api::Chat => format!("chatcmpl-{name}"),
        Api::Completion => format!("cmpl-{name}"),
    };
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let label = Label { id: &id, model: &request.model.name, created };
    let echoes: Vec<Option<String>> = prompts.into_iter().map(|p| p.echo).collect();
    if request.stream {
        let ends = Ends { deadline, cut: Box::pin(shared.cut()), permit };
        streamed(&request, &label, &echoes, running, ends).await
    } else {
        let response = tokio::select! {
            response = whole(&request, &label, &echoes, running) => response,
            () = sleep_until(deadline) => Err(ApiError::timed_out()),
            () = shared.cut() => Err(ApiError::shutting_down()),
        };
        drop(permit);
        response
    }
}

/// Reads a request: for `chosen`, or for the model that it names.
async fn prepare(
    shared: &Arc<Shared>,
    api: Api,
    body: &Arc<Vec<u8>>,
    chosen: Option<Arc<ServedModel>>,
) -> Result<(Request, Vec<Encoded>), ApiError> {
    let length = body.len();
    let (shared, body) = (shared.clone(), body.clone());
    let work = move || {
        let mut request = Request::parse(api, &body, &shared, chosen)?;
        let prompts = prompt::encode(&mut request)?;
        Ok((request, prompts))
    };
    if length <= INLINE_BYTES {
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // It panicked, which is a bug, or the runtime is going down.
        Err(_) => Err(ApiError::new(
            hyper::StatusCode::INTERNAL_SERVER_ERROR,
            "internal_error",
            "The request could not be read.",
        )),
    }
}

async fn start(
    shared: &Shared,
    request: &Request,
    prompts: &[Encoded],
    trace: TraceContext,
    caller: &Caller,
) -> Result<Vec<Generation>, ApiError> {
    caller.check(&request.model)?;
    let may_use =
        |id: &ModelId| shared.driver.model_by_id(*id).is_some_and(|model| caller.allows(&model.name));
    let otherwise: Vec<ModelId> = request.otherwise.iter().copied().filter(may_use).collect();
    let context = request.model.context;
    let mut generations = Vec::with_capacity(prompts.len() * request.n);
    let output_max = match &request.model.source {
        Source::Upstream { output_max, .. } => output_max.unwrap_or(u32::MAX),
        Source::Nodes { .. } => u32::MAX,
    };
    for (number, prompt) in prompts.iter().enumerate() {
        for choice in 0..request.n {
            let room = context.saturating_sub(prompt.ids.len() as u32).min(output_max);
            let mut ask = Ask {
                request: RequestId(0),
                attempt: 0,
                model: request.model.id,
                otherwise: otherwise.clone(),
                prompt: prompt.ids.clone(),
                output: Vec::new(),
                sampling: Sampling {
                    seed: choice_seed(request.sampling.seed, choice),
                    ..request.sampling.clone()
                },
                max_tokens: request.max_tokens.unwrap_or(room).min(room),
                stop: request.stop.clone(),
                ignore_eos: request.ignore_eos,
                grammar: prompt.grammar.as_ref().map(|(text, _)| text.clone()),
                priority: request.priority,
                deadline: Some(shared.limits.request_timeout),
                ttft: request.ttft,
                max_cost: request.max_cost,
                salt: 0,
                key: KeyId(0),
                tags: request.tags.clone(),
                trace,
            };
            caller.sign(&mut ask);
            let conversation = request.conversations.get(number).cloned();
            generations.push(shared.driver.answer(ask, conversation, request.api.operation()).await?);
        }
    }
    Ok(generations)
}

async fn streamed(
    request: &Request,
    label: &Label<'_>,
    echoes: &[Option<String>],
    mut running: Running,
    mut ends: Ends,
) -> Result<Response<Body>, ApiError> {
    let mut writer = Writer::of_stream(request.api, label, running.count(), request.include_usage);
    let mut opening = BytesMut::with_capacity(1024);
    for choice in 0..running.count() {
        match (&echoes[choice / request.n], request.api) {
            (_, Api::Chat) => writer.role(&mut opening, choice),
            (Some(prompt), Api::Completion) => {
                writer.text(&mut opening, choice, prompt, None);
                writer.skip(choice, prompt);
            }
            (None, Api::Completion) => {}
        }
    }
    let first = tokio::select! {
        next = poll_fn(|cx| running.poll_next(cx)) => next,
        () = tokio::time::sleep(FIRST_EVENT_WAIT) => None,
        () = &mut ends.cut => return Err(ApiError::shutting_down()),
    };
    if let Some((_, Next::Failed(failure))) = first {
        return Err(failure.into());
    }
    let total = Total::new(echoes.len(), request.n);
    let mut stream = EventStream::new(running, writer, total, request.include_usage, opening, ends);
    if let Some((choice, next)) = first {
        stream.write(choice, next);
    }
    let mut response = Response::new(Body::Events(Box::new(stream)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx and its like would hold the events back.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    Ok(response)
}

async fn whole(
    request: &Request,
    label: &Label<'_>,
    echoes: &[Option<String>],
    mut running: Running,
) -> Result<Response<Body>, ApiError> {
    let mut writer = Writer::of_whole(request.api, label, running.count());
    let mut total = Total::new(echoes.len(), request.n);
    let mut choices: Vec<Gathered> = (0..running.count()).map(|_| Gathered::default()).collect();
    for (choice, gathered) in choices.iter_mut().enumerate() {
        gathered.logprobs = request.sampling.logprobs.map(|_| Vec::new());
        if let Some(prompt) = &echoes[choice / request.n] {
            gathered.text.push_str(prompt);
            writer.skip(choice, prompt);
        }
    }
    while let Some((choice, next)) = poll_fn(|cx| running.poll_next(cx)).await {
        match next {
            Next::Said(said) => choices[choice].add(said),
            Next::Finished { ending, usage } => {
                choices[choice].ending = Some(ending);
                total.add(choice, &usage);
            }
            Next::Failed(failure) => return Err(failure.into()),
        }
    }
    let body = writer.whole(&choices, &total, &running).freeze();
    let mut response = Response::new(Body::full(body));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}
