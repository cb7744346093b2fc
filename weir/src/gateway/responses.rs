//! OpenAI's Responses API: `/v1/responses`.
//!
//! A request becomes the chat that it is (`read`), and the parts of the answer become items (`write`). Answers are kept in
//! memory for a while (`store`), so that the next request can go on with them by `previous_response_id`; where one is gone,
//! that is said. What OpenAI's servers would run (their tools, conversations, stored prompts) is refused by name.
mod read;
mod store;
mod write;

use super::Shared;
use super::body::Body;
use super::error::ApiError;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Response, StatusCode};
use serde_json::{Value, json};

pub(super) use read::{Asked, read};
pub(super) use store::{Owner, Store};
pub(super) use write::{Writer, whole};

/// `GET` or `DELETE /v1/responses/{id}`.
pub(super) fn kept(
    shared: &Shared,
    method: &Method,
    owner: Owner,
    id: &str,
) -> Result<Response<Body>, ApiError> {
    let missing = || {
        let id: String = id.chars().take(100).collect();
        let message =
            format!("Response with id '{id}' not found: this server keeps answers in memory, for a while.");
        ApiError::new(StatusCode::NOT_FOUND, "response_not_found", message)
    };
    let found = match *method {
        Method::GET => shared.responses.get(owner, id).ok_or_else(missing)?,
        Method::DELETE if shared.responses.forget(owner, id) => {
            json!({ "id": id, "object": "response", "deleted": true })
        }
        Method::DELETE => return Err(missing()),
        _ => return Err(ApiError::method("GET, DELETE")),
    };
    Ok(respond(&found))
}

fn respond(value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::full(value.to_string()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
