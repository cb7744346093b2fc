//! Which models there are, and whether their engines work.
use super::Shared;
use super::body::Body;
use super::caller::Caller;
use super::error::ApiError;
use super::messages;
use crate::driver::{Driver, ServedModel, Source};
use crate::telemetry;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use weir_scheduler::{Class, Wanted};

/// The model called `name`: exactly, or without regard to case, to an owner before it (`owner/name`), to `.gguf` after it;
/// or of which that is another name.
pub(super) fn find(shared: &Shared, name: Option<&str>) -> Result<Arc<ServedModel>, ApiError> {
    let driver = &shared.driver;
    let known = || driver.models().iter().map(|m| m.name.clone()).collect::<Vec<_>>();
    let Some(name) = name else { return Err(ApiError::no_model(None, &known())) };
    if let Some(model) = driver.model(name) {
        return Ok(model);
    }
    let alike = |wanted: &str| {
        let mut alike = driver.models().into_iter().filter(|m| !m.is_foreign() && plain(&m.name) == wanted);
        alike.next().filter(|_| alike.next().is_none())
    };
    let wanted = plain(name);
    let other = || {
        let known = shared.aliases.iter().find(|(alias, _)| plain(alias) == wanted)?;
        alike(&plain(&known.1))
    };
    alike(&wanted).or_else(other).ok_or_else(|| ApiError::no_model(Some(name), &known()))
}

/// A name without an owner before it and `.gguf` after it, in small letters.
fn plain(name: &str) -> String {
    let name = name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
    name.strip_suffix(".gguf").map(str::to_owned).unwrap_or(name)
}

/// What a request wants whose model no node holds: a class of models, or one that a node could load, and its name.
pub(super) fn wanted(shared: &Shared, body: &[u8]) -> Option<(Wanted, Option<String>)> {
    #[derive(Deserialize)]
    struct Asked {
        model: Option<String>,
        weir: Option<Options>,
    }
    #[derive(Deserialize)]
    struct Options {
        model_size: Option<String>,
    }
    let asked: Asked = serde_json::from_slice(body).ok()?;
    let class = asked.weir.and_then(|weir| weir.model_size);
    if let Some(class) = class.as_deref().or(asked.model.as_deref()).and_then(Class::named) {
        return Some((Wanted::Class(class), None));
    }
    let name = plain(&asked.model?);
    let alias = shared.aliases.iter().find(|(alias, _)| plain(alias) == name).map(|(_, known)| plain(known));
    let mut offers = shared.driver.offers().into_iter();
    let (name, id) = offers.find(|(offered, _)| {
        let offered = plain(offered);
        offered == name || alias.as_ref() == Some(&offered)
    })?;
    Some((Wanted::Model(id), Some(name)))
}

/// `GET /v1/models`.
pub(super) fn list(driver: &Driver, caller: &Caller, is_anthropic: bool) -> Response<Body> {
    if is_anthropic {
        let mut models = driver.models();
        models.retain(|model| caller.allows(&model.name));
        return respond(StatusCode::OK, &messages::models(&models));
    }
    let offers = driver.offers().into_iter().filter(|(name, _)| caller.allows(name));
    let offered = offers.map(|(name, id)| {
        let weir = json!({ "sha256": id.to_string(), "loaded": false });
        json!({ "id": name, "object": "model", "created": 0, "owned_by": "weir", "weir": weir })
    });
    let data: Vec<Value> = driver
        .models()
        .iter()
        .filter(|m| caller.allows(&m.name))
        .map(|m| describe(m))
        .chain(offered)
        .collect();
    respond(StatusCode::OK, &json!({ "object": "list", "data": data }))
}

/// `GET /v1/models/{id}`.
pub(super) fn show(
    shared: &Shared,
    caller: &Caller,
    id: &str,
    is_anthropic: bool,
) -> Result<Response<Body>, ApiError> {
    let model = find(shared, Some(id))?;
    caller.check(&model.name)?;
    Ok(respond(StatusCode::OK, &if is_anthropic { messages::describe(&model) } else { describe(&model) }))
}

/// `GET /healthz`: 503 where a restart would help.
pub(super) fn live(driver: &Driver) -> Response<Body> {
    let health = driver.health();
    probe(health.live, &health.detail)
}

/// `GET /readyz`: 503 where requests can't be served now.
pub(super) fn ready(driver: &Driver) -> Response<Body> {
    let health = driver.health();
    probe(health.ready, &health.detail)
}

/// `GET /metrics`, for Prometheus.
pub(super) async fn metrics(driver: &Driver) -> Response<Body> {
    let mut response = Response::new(Body::full(telemetry::render(&telemetry::gather(driver).await)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(telemetry::CONTENT_TYPE));
    response
}

fn describe(model: &ServedModel) -> Value {
    let (owner, weir) = match &model.source {
        Source::Nodes { .. } => ("weir", json!({ "context": model.context, "sha256": model.id.to_string() })),
        Source::Upstream { provider, own, .. } => {
            (&**provider, json!({ "context": model.context, "upstream": true, "own": own }))
        }
    };
    json!({ "id": model.name, "object": "model", "created": model.created, "owned_by": owner, "weir": weir })
}

fn probe(good: bool, detail: &str) -> Response<Body> {
    let (status, word) =
        if good { (StatusCode::OK, "ok") } else { (StatusCode::SERVICE_UNAVAILABLE, "unavailable") };
    respond(status, &json!({ "status": word, "detail": detail }))
}

fn respond(status: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::full(value.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
