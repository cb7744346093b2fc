//! Asking a gateway: the OpenAI API over HTTP/1.1, streamed.
//!
//! One connection a request: closing it is how a request is cancelled.
mod reply;

use crate::answer::{End, Finish, Out, Piece, Usage};
use crate::{Ask, ClientError, Options};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, header};
use reply::{Chunk, ErrorBody, ModelList};
use serde_json::{Map, Value, json};
use std::time::Duration;
use tokio::sync::OnceCell;
use weir_scheduler::Priority;
use weir_upstream::sse::Events;
use weir_upstream::{Address, Connection, Connector};

/// To find the host, connect and shake hands.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Of a refusal or a list of models.
const BODY_BYTES_MAX: usize = 1 << 20;
/// Characters of a reply that is not what was expected, in a message.
const EXCERPT_CHARS: usize = 200;

/// One gateway.
pub(crate) struct Gateway {
    url: String,
    key: Option<String>,
    patience: Duration,
    /// The model that is meant where none is named.
    first_model: OnceCell<String>,
}

impl Gateway {
    pub(crate) fn new(url: String, key: Option<String>, patience: Duration) -> Gateway {
        Gateway { url, key, patience, first_model: OnceCell::new() }
    }

    fn address(&self) -> Result<Address, ClientError> {
        Address::parse(&self.url).ok_or_else(|| ClientError::Url(self.url.clone()))
    }

    /// The names of the models that it serves.
    pub(crate) async fn models(&self) -> Result<Vec<String>, ClientError> {
        let address = self.address()?;
        let (_connection, response) = self.send(&address, Method::GET, "models", Bytes::new()).await?;
        let body = self.whole(&address, response).await?;
        let list: ModelList = serde_json::from_slice(&body).map_err(|_| protocol(&address, &body))?;
        Ok(list.data.into_iter().map(|m| m.id).collect())
    }

    /// Asks, and passes on the answer's text as it comes.
    pub(crate) async fn answer(&self, ask: Ask, options: Options, out: Out) -> Result<End, ClientError> {
        let model = match options.model.clone() {
            Some(model) => model,
            None => self.first_model.get_or_try_init(|| self.find_first_model()).await?.clone(),
        };
        let (path, body) = request(&ask, &model, &options);
        let address = self.address()?;
        let (_connection, mut response) = self.send(&address, Method::POST, path, body.into()).await?;
        let mut events = Events::default();
        let mut reading = Reading::new(model);
        let mut texts = Vec::new();
        while let Some(bytes) = self.next_bytes(&address, &mut response).await? {
            let taken = events.push(&bytes, |data| reading.take(&address, data, &mut texts));
            // text that came before a failure is still text
            for text in texts.drain(..) {
                if out.send(Ok(Piece::Text(text))).await.is_err() {
                    return Err(ClientError::Cancelled);
                }
            }
            taken?.map_err(|_| protocol(&address, b"an event of more than a megabyte"))?;
            if reading.done {
                break;
            }
        }
        reading.end(&address)
    }

    async fn find_first_model(&self) -> Result<String, ClientError> {
        let first = self.models().await?.into_iter().next();
        first.ok_or_else(|| ClientError::Invalid(format!("{} serves no model", self.url)))
    }

    /// Sends a request; a refusal is an error.
    async fn send(
        &self,
        address: &Address,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(Connection, Response<Incoming>), ClientError> {
        let mut request = Request::builder()
            .method(method)
            .uri(address.path(path))
            .header(header::HOST, &address.authority)
            .header(header::USER_AGENT, concat!("weir/", env!("CARGO_PKG_VERSION")))
            .header(header::ACCEPT, "text/event-stream, application/json")
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request.body(Full::new(body));
        let request =
            request.map_err(|_| ClientError::Invalid("the key can't be sent in a header".into()))?;
        let unreachable = |why| ClientError::Unreachable { host: address.authority.clone(), why };
        let connector = Connector::to(address).map_err(unreachable)?;
        let mut connection = connector.open(address, CONNECT_TIMEOUT).await.map_err(unreachable)?;
        let sent = tokio::time::timeout(self.patience, connection.sender.send_request(request)).await;
        let response = sent.map_err(|_| self.silent(address))?.map_err(|e| broken(address, &e))?;
        if response.status().is_success() {
            return Ok((connection, response));
        }
        let status = response.status().as_u16();
        let body = self.whole(address, response).await?;
        let message = match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => body.error.message(),
            Err(_) => format!("{} refused: {}", address.authority, excerpt(&body)),
        };
        Err(ClientError::Refused { status, message })
    }

    async fn next_bytes(
        &self,
        address: &Address,
        response: &mut Response<Incoming>,
    ) -> Result<Option<Bytes>, ClientError> {
        loop {
            let frame = tokio::time::timeout(self.patience, response.frame()).await;
            match frame.map_err(|_| self.silent(address))? {
                None => return Ok(None),
                Some(Err(e)) => return Err(broken(address, &e)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) => return Ok(Some(bytes)),
                    Err(_trailers) => {}
                },
            }
        }
    }

    async fn whole(
        &self,
        address: &Address,
        mut response: Response<Incoming>,
    ) -> Result<Vec<u8>, ClientError> {
        let mut body = Vec::new();
        while let Some(bytes) = self.next_bytes(address, &mut response).await? {
            let room = BODY_BYTES_MAX - body.len();
            body.extend_from_slice(&bytes[..bytes.len().min(room)]);
            if bytes.len() > room {
                break;
            }
        }
        Ok(body)
    }

    fn silent(&self, address: &Address) -> ClientError {
        ClientError::Silent { host: address.authority.clone(), after: self.patience }
    }
}

/// Path below `/v1` and body.
fn request(ask: &Ask, model: &str, options: &Options) -> (&'static str, Vec<u8>) {
    let mut body = json!({ "model": model, "stream": true, "stream_options": { "include_usage": true } });
    let path = match ask {
        Ask::Chat(messages) => {
            body["messages"] = json!(messages);
            "chat/completions"
        }
        Ask::Complete(prompt) => {
            body["prompt"] = json!(prompt);
            "completions"
        }
    };
    if let Some(max_tokens) = options.max_tokens {
        body["max_tokens"] = json!(max_tokens);
    }
    if let Some(temperature) = options.temperature {
        body["temperature"] = json!(temperature);
    }
    if let Some(top_p) = options.top_p {
        body["top_p"] = json!(top_p);
    }
    if let Some(seed) = options.seed {
        body["seed"] = json!(seed);
    }
    if !options.stop.is_empty() {
        body["stop"] = json!(options.stop);
    }
    if let Some(weir) = weir_options(options) {
        body["weir"] = weir;
    }
    (path, body.to_string().into_bytes())
}

/// What only Weir's own gateways understand; none where nothing of it is asked for.
fn weir_options(options: &Options) -> Option<Value> {
    let mut weir = Map::new();
    if let Some(priority) = options.priority {
        let name = match priority {
            Priority::Background => "background",
            Priority::Normal => "normal",
            Priority::Interactive => "interactive",
        };
        weir.insert("priority".into(), name.into());
    }
    if let Some(ttft) = options.ttft {
        let ms = u64::try_from(ttft.as_millis()).unwrap_or(u64::MAX);
        weir.insert("ttft_ms".into(), ms.max(1).into());
    }
    if !options.tags.is_empty() {
        let tags = options.tags.iter().map(|(name, value)| (name.clone(), Value::from(value.as_str())));
        weir.insert("tags".into(), Value::Object(tags.collect()));
    }
    (!weir.is_empty()).then_some(Value::Object(weir))
}

/// An answer's events, as far as they have come.
struct Reading {
    model: String,
    finish: Option<Finish>,
    usage: Usage,
    nodes: Vec<String>,
    /// `[DONE]` has come.
    done: bool,
}

impl Reading {
    fn new(model: String) -> Reading {
        Reading { model, finish: None, usage: Usage::default(), nodes: Vec::new(), done: false }
    }

    /// One event; its text goes to `texts`.
    fn take(&mut self, address: &Address, data: &str, texts: &mut Vec<String>) -> Result<(), ClientError> {
        if self.done || data.trim().is_empty() {
            return Ok(());
        }
        if data.trim() == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        if let Ok(ErrorBody { error }) = serde_json::from_str(data)
            && !error.is_null()
        {
            return Err(ClientError::Failed(error.message()));
        }
        let chunk: Chunk = serde_json::from_str(data).map_err(|_| protocol(address, data.as_bytes()))?;
        if let Some(model) = chunk.model {
            self.model = model;
        }
        if let Some(usage) = chunk.usage {
            self.usage = usage.into();
        }
        if let Some(weir) = chunk.weir {
            self.nodes = weir.nodes;
        }
        let Some(choice) = chunk.choices.into_iter().next() else { return Ok(()) };
        let text = choice.text.or(choice.delta.and_then(|d| d.content)).unwrap_or_default();
        if !text.is_empty() {
            texts.push(text);
        }
        if let Some(reason) = choice.finish_reason {
            self.finish = Some(match reason.as_str() {
                "stop" => Finish::Stop,
                "length" => Finish::Length,
                _ => Finish::Other(reason),
            });
        }
        Ok(())
    }

    fn end(self, address: &Address) -> Result<End, ClientError> {
        match self.finish {
            Some(finish) => Ok(End { finish, usage: self.usage, model: self.model, nodes: self.nodes }),
            None => Err(ClientError::Broken {
                host: address.authority.clone(),
                why: "no reason for its end was given".into(),
            }),
        }
    }
}

fn broken(address: &Address, e: &hyper::Error) -> ClientError {
    ClientError::Broken { host: address.authority.clone(), why: e.to_string() }
}

fn protocol(address: &Address, got: &[u8]) -> ClientError {
    ClientError::Protocol { host: address.authority.clone(), why: format!("got {}", excerpt(got)) }
}

/// The beginning of something, fit for a terminal.
fn excerpt(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * EXCERPT_CHARS)]);
    let text: String =
        text.trim().chars().take(EXCERPT_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect();
    match text.is_empty() {
        true => "nothing".into(),
        false => text,
    }
}
