//! On whose behalf a request comes: every endpoint but the public ones passes through here.
use super::Shared;
use super::error::ApiError;
use crate::driver::Ask;
use crate::keys::{Key, Refused};
use hyper::StatusCode;
use hyper::header::{self, HeaderMap};
use std::sync::Arc;
use std::time::SystemTime;
use weir_scheduler::KeyId;

/// Whoever asks: the holder of an API key, or the owner, who has the master key or needs none.
#[derive(Clone, Debug, Default)]
pub(super) struct Caller(Option<Arc<Key>>);

/// What `Authorization: Bearer ...` carries.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token.trim_ascii())
}

/// The key that headers carry: OpenAI's clients send `Authorization: Bearer KEY`, Anthropic's `x-api-key: KEY`.
pub(super) fn given(headers: &HeaderMap) -> Option<&[u8]> {
    bearer(headers).or_else(|| Some(headers.get("x-api-key")?.as_bytes().trim_ascii()))
}

impl Caller {
    /// Who sends these headers. Where there is neither a master key nor any other, everybody is the owner.
    pub(super) fn of(shared: &Shared, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let keys = shared.accounts.as_ref().map(|accounts| &accounts.keys).filter(|keys| !keys.is_empty());
        if shared.key.is_none() && keys.is_none() {
            return Ok(Caller(None));
        }
        let refuse = |code, message: &str| Err(ApiError::new(StatusCode::UNAUTHORIZED, code, message));
        let Some(given) = given(headers) else {
            return refuse(
                "missing_api_key",
                "You didn't provide an API key. Send it in the header 'Authorization: Bearer YOUR_KEY'.",
            );
        };
        // Comparing hashes takes the same time whatever they are.
        if shared.key.is_some_and(|key| blake3::hash(given) == key) {
            return Ok(Caller(None));
        }
        let found = keys.map_or(Err(Refused::Unknown), |keys| keys.find(given, SystemTime::now()));
        match found {
            Ok(key) => Ok(Caller(Some(key))),
            Err(Refused::Unknown) => refuse("invalid_api_key", "Incorrect API key provided."),
            Err(Refused::Expired) => refuse("expired_api_key", "This API key has expired."),
            Err(Refused::Revoked) => refuse("revoked_api_key", "This API key was revoked."),
        }
    }

    /// Whether requests may go to a model of this name.
    pub(super) fn allows(&self, model: &str) -> bool {
        self.0.as_ref().is_none_or(|key| key.allows(model))
    }

    /// Fails where requests may not go to a model.
    pub(super) fn check(&self, model: &str) -> Result<(), ApiError> {
        match &self.0 {
            Some(key) if !key.allows(model) => Err(ApiError::new(
                StatusCode::FORBIDDEN,
                "model_not_allowed",
                format!(
                    "The API key '{}' may not use the model '{model}'; it may use: {}.",
                    key.name,
                    key.models.join(", ")
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Puts the caller's key on a request, and the tags that come with it.
    pub(super) fn sign(&self, ask: &mut Ask) {
        if let Some(key) = &self.0 {
            ask.key = KeyId(key.number);
            key.force_tags(&mut ask.tags);
        }
    }
}
