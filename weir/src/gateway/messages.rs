//! Anthropic's API: `/v1/messages` and `/v1/messages/count_tokens`.
//!
//! A request becomes the chat that it is (`read`), so that any model can answer it, and goes its way like every other; beside
//! it goes the request as it came, for a provider that speaks this API itself. The parts of the answer become blocks
//! (`write`). What Anthropic's servers would run (their tools, files, containers) is refused by name.
mod read;
mod write;

use super::Shared;
use super::answer;
use super::body::Body;
use super::caller::Caller;
use super::error::ApiError;
use super::request::Api;
use crate::driver::ServedModel;
use hyper::Response;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use serde_json::{Value, json};
use std::sync::Arc;

pub(super) use read::read;
pub(super) use write::{Writer, error, whole};

/// Whether a request is one of this API's: by its path or, where that is OpenAI's too, by the header that clients send.
pub(super) fn is_asked(path: &str, headers: &HeaderMap) -> bool {
    path.starts_with("/v1/messages") || headers.contains_key("anthropic-version")
}

/// `GET /v1/models` in this API's form, and `GET /v1/models/{id}` for one of them.
pub(super) fn models(models: &[Arc<ServedModel>]) -> Value {
    let data: Vec<Value> = models.iter().map(|model| describe(model)).collect();
    let id = |model: Option<&Arc<ServedModel>>| model.map(|model| model.name.clone());
    json!({ "data": data, "has_more": false, "first_id": id(models.first()), "last_id": id(models.last()) })
}

/// A model in this API's form.
pub(super) fn describe(model: &ServedModel) -> Value {
    let created = i64::try_from(model.created).ok().and_then(|s| jiff::Timestamp::from_second(s).ok());
    let created = created.unwrap_or_default().to_string();
    json!({
        "type": "model", "id": model.name, "display_name": model.name, "created_at": created,
        "max_input_tokens": model.context,
    })
}

/// `POST /v1/messages/count_tokens`.
pub(super) async fn count(
    shared: &Arc<Shared>,
    caller: &Caller,
    body: Vec<u8>,
) -> Result<Response<Body>, ApiError> {
    let (tokens, estimated) = answer::count(shared, caller, Api::CountTokens, body).await?;
    let mut said = json!({ "input_tokens": tokens });
    if estimated {
        said["weir"] = json!({ "estimated": true });
    }
    let mut response = Response::new(Body::full(said.to_string()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}
