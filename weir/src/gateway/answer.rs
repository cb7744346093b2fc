//! From a request's body to its answer, streamed or whole.
use super::Shared;
use super::body::Body;
use super::caller::Caller;
use super::error::ApiError;
use super::form::{self, Before, Form};
use super::grammar;
use super::models;
use super::parts::{Gathered, Next};
use super::prompt::{self, Encoded};
use super::request::{Api, Request, choice_seed};
use super::responses::Owner;
use super::running::{Running, Total};
use super::stats::Counted;
use super::stopped::StopWatch;
use super::stream::{Ends, EventStream, backstop};
use super::write::Label;
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

/// One call of an API that generates.
pub(super) struct Call<'a> {
    pub(super) api: Api,
    /// Unique, part of the answer's id.
    pub(super) name: &'a str,
    pub(super) body: Vec<u8>,
    /// Its part in the telemetry, and in the trace.
    pub(super) served: Served,
    pub(super) owner: Owner,
    /// Held until the answer has been sent.
    pub(super) permit: OwnedSemaphorePermit,
    pub(super) caller: Caller,
}

/// What is to be read, perhaps more than once.
#[derive(Clone)]
struct Posted {
    api: Api,
    body: Arc<Vec<u8>>,
    owner: Owner,
}

/// Answers a call.
pub(super) async fn generate(shared: &Arc<Shared>, call: Call<'_>) -> Result<Response<Body>, ApiError> {
    let (arrived, deadline) = (Instant::now(), backstop(&shared.limits));
    let Call { api, name, body, served, owner, permit, caller } = call;
    let posted = Posted { api, body: Arc::new(body), owner };
    let (request, prompts) = find_and_prepare(shared, &caller, &posted).await?;
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
    let running = running.voiced(prompt::voices(&prompts, request.n)).watched(stop_watch(&request));
    let id = match api {
        Api::Chat => format!("chatcmpl-{name}"),
        Api::Completion => format!("cmpl-{name}"),
        Api::Messages | Api::CountTokens => format!("msg_{name}"),
        Api::Responses => format!("resp_{name}"),
        Api::Embeddings => format!("embd-{name}"),
    };
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let label = Label { id: &id, model: &request.model.name, created };
    let prompt_tokens = prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let echoes: Vec<Option<String>> = prompts.into_iter().map(|p| p.echo).collect();
    let before = Before { request: &request, label: &label, echoes: &echoes, prompt_tokens };
    if request.stream {
        let ends = Ends { deadline, cut: Box::pin(shared.cut()), permit };
        streamed(&before, running, ends).await
    } else {
        let response = tokio::select! {
            response = whole(&before, running) => response,
            () = sleep_until(deadline) => Err(ApiError::timed_out()),
            () = shared.cut() => Err(ApiError::shutting_down()),
        };
        drop(permit);
        response
    }
}

/// How many tokens a request's prompt has; and whether that is an estimate.
pub(super) async fn count(
    shared: &Arc<Shared>,
    caller: &Caller,
    api: Api,
    body: Vec<u8>,
) -> Result<(usize, bool), ApiError> {
    let posted = Posted { api, body: Arc::new(body), owner: Owner::default() };
    let (request, prompts) = find_and_prepare(shared, caller, &posted).await?;
    Ok((prompts.iter().map(|prompt| prompt.ids.len()).sum(), request.model.text().is_none()))
}

/// Reads a request that its caller may make. Its model may have to be loaded first.
async fn find_and_prepare(
    shared: &Arc<Shared>,
    caller: &Caller,
    posted: &Posted,
) -> Result<(Request, Vec<Encoded>), ApiError> {
    let found = match prepare(shared, posted, None).await {
        // Perhaps a node can load it, or it is a class of models.
        Err(error) if error.is_no_model() => {
            let Some((wanted, name)) = models::wanted(shared, &posted.body) else { return Err(error) };
            name.map_or(Ok(()), |name| caller.check(&name))?;
            let model = tokio::select! {
                model = shared.driver.bring(wanted) => model?,
                () = shared.cut() => return Err(ApiError::shutting_down()),
            };
            caller.check(&model.name)?;
            prepare(shared, posted, Some(model)).await
        }
        prepared => prepared,
    }?;
    caller.check(&found.0.model.name)?;
    Ok(found)
}

/// Reads a request: for `chosen`, or for the model that it names.
async fn prepare(
    shared: &Arc<Shared>,
    posted: &Posted,
    chosen: Option<Arc<ServedModel>>,
) -> Result<(Request, Vec<Encoded>), ApiError> {
    let length = posted.body.len();
    let (shared, Posted { api, body, owner }) = (shared.clone(), posted.clone());
    let work = move || {
        let read = || {
            let mut request = Request::parse(api, &body, &shared, chosen, owner)?;
            let prompts = prompt::encode(&mut request)?;
            Ok((request, prompts))
        };
        let api_name = |error: ApiError| match api {
            Api::Responses => error
                .renamed("messages", "input")
                .renamed("max_completion_tokens", "max_output_tokens")
                .renamed("response_format", "text.format"),
            _ => error,
        };
        read().map_err(api_name)
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

/// Anthropic's API says at which stop sequence an answer ended; nodes of our own don't.
fn stop_watch(request: &Request) -> Option<StopWatch> {
    let stops = Some(&request.stop).filter(|stops| request.api == Api::Messages && !stops.is_empty())?;
    let (tokenizer, template) = request.model.text()?;
    let is_own = |stop: &&String| !template.stops().contains(&stop.as_str());
    Some(StopWatch::new(tokenizer.clone(), stops.iter().filter(is_own).cloned().collect()))
}

async fn streamed(
    before: &Before<'_>,
    mut running: Running,
    mut ends: Ends,
) -> Result<Response<Body>, ApiError> {
    let mut opening = BytesMut::with_capacity(1024);
    let form = Form::begin(before, running.count(), &mut opening);
    let first = tokio::select! {
        next = poll_fn(|cx| running.poll_next(cx)) => next,
        () = tokio::time::sleep(FIRST_EVENT_WAIT) => None,
        () = &mut ends.cut => return Err(ApiError::shutting_down()),
    };
    if let Some((_, Next::Failed(failure))) = first {
        return Err(failure.into());
    }
    let total = Total::new(before.echoes.len(), before.request.n);
    let mut stream = EventStream::new(running, form, total, opening, ends);
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

async fn whole(before: &Before<'_>, mut running: Running) -> Result<Response<Body>, ApiError> {
    let Before { request, echoes, .. } = before;
    let mut total = Total::new(echoes.len(), request.n);
    let mut choices: Vec<Gathered> = (0..running.count()).map(|_| Gathered::default()).collect();
    for (choice, gathered) in choices.iter_mut().enumerate() {
        gathered.logprobs = request.sampling.logprobs.map(|_| Vec::new());
        if let Some(prompt) = &echoes[choice / request.n] {
            gathered.text.push_str(prompt);
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
    let body = form::whole(before, &choices, &total, &running);
    let mut response = Response::new(Body::full(body));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}
