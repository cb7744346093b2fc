//! The API's error objects: the one place where a failure becomes an HTTP status.
use super::body::Body;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use hyper::{Response, StatusCode};
use serde_json::json;
use std::borrow::Cow;
use weir_scheduler::{Failure, FailureKind};

/// An answer that says why there is none.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    code: Option<&'static str>,
    param: Option<Cow<'static, str>>,
    message: String,
    allow: Option<&'static str>,
    /// Seconds after which it may work.
    after_s: Option<u32>,
}

impl ApiError {
    /// Any status, with OpenAI's `code` for it.
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError {
            status,
            code: Some(code),
            param: None,
            message: message.into(),
            allow: None,
            after_s: None,
        }
    }

    /// 400, about one field.
    pub(super) fn field(
        param: impl Into<Cow<'static, str>>,
        code: &'static str,
        message: impl Into<String>,
    ) -> ApiError {
        ApiError { param: Some(param.into()), ..ApiError::new(StatusCode::BAD_REQUEST, code, message) }
    }

    /// 400: the field is understood, but this gateway can't do it.
    pub(super) fn unsupported(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> ApiError {
        ApiError::field(param, "unsupported_parameter", message)
    }

    /// The same, about a field of the object `outer`.
    pub(super) fn within(self, outer: &str) -> ApiError {
        ApiError { param: self.param.map(|param| format!("{outer}.{param}").into()), ..self }
    }

    /// Its status and the API's word for it.
    pub(super) fn told(&self) -> (u16, Option<&'static str>) {
        (self.status.as_u16(), self.code)
    }

    /// Whether it is that the model isn't here.
    pub(super) fn is_no_model(&self) -> bool {
        self.code == Some("model_not_found")
    }

    /// 404, with what there is instead.
    pub(super) fn no_model(asked: Option<&str>, known: &[String]) -> ApiError {
        let known = if known.is_empty() {
            "no model is loaded".into()
        } else {
            format!("there is: {}", known.join(", "))
        };
        let message = match asked {
            // Echoed, so bounded.
            Some(name) => format!(
                "The model '{}' does not exist here; {known}",
                name.chars().take(200).collect::<String>()
            ),
            None => format!("You must provide a 'model' parameter; {known}"),
        };
        ApiError {
            param: Some("model".into()),
            ..ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message)
        }
    }

    /// 405, with what is allowed.
    pub(super) fn method(allow: &'static str) -> ApiError {
        let message = format!("This endpoint only takes {allow}.");
        ApiError {
            allow: Some(allow),
            ..ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
        }
    }

    /// 403: only who owns this scheduler may.
    pub(super) fn owner_only() -> ApiError {
        let message =
            "Only the owner of the scheduler's state folder may do this; `weir` finds the token there.";
        ApiError::new(StatusCode::FORBIDDEN, "admin_only", message)
    }

    /// 503: the gateway is going down.
    pub(super) fn shutting_down() -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", "The server is shutting down.")
    }

    /// 504: the gateway's own limit on a request's life.
    pub(super) fn timed_out() -> ApiError {
        ApiError::new(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout",
            "The request took longer than this server allows.",
        )
    }

    /// Its code, if it says that whoever asks may not.
    pub(super) fn turns_away(&self) -> Option<&'static str> {
        let refused = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN].contains(&self.status);
        self.code.filter(|_| refused)
    }

    /// Another name for the field that it is about, which is called that in its API.
    pub(super) fn renamed(self, from: &str, to: &'static str) -> ApiError {
        let param = self.param.map(|param| if param == from { to.into() } else { param });
        ApiError { param, ..self }
    }

    /// Whether there is no room now, and may be later.
    pub(super) fn is_no_room(&self) -> bool {
        [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&self.status)
    }

    /// What is wrong, for a person.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// Its status in Anthropic's API, which has one of its own for "no room now".
    fn anthropic_status(&self) -> StatusCode {
        match self.status {
            StatusCode::SERVICE_UNAVAILABLE => StatusCode::from_u16(529).unwrap_or(self.status),
            other => other,
        }
    }

    /// Its kind in Anthropic's API.
    pub(super) fn anthropic_kind(&self) -> &'static str {
        match self.anthropic_status().as_u16() {
            401 => "authentication_error",
            402 => "billing_error",
            403 => "permission_error",
            404 => "not_found_error",
            408 | 504 => "timeout_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            529 => "overloaded_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }

    /// The whole response in Anthropic's form, to the request `name`.
    pub(super) fn to_anthropic(&self, name: &str) -> Response<Body> {
        let mut response = self.to_response();
        let error = json!({ "type": self.anthropic_kind(), "message": self.message });
        let body = json!({ "type": "error", "error": error, "request_id": name });
        *response.body_mut() = Body::full(body.to_string());
        *response.status_mut() = self.anthropic_status();
        response
    }

    /// `{"error":{...}}`.
    pub(super) fn to_json(&self) -> Vec<u8> {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            // As OpenAI says it: clients stop, and don't try again.
            StatusCode::TOO_MANY_REQUESTS if self.code == Some("insufficient_quota") => "insufficient_quota",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            s if s.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "error": {
            "message": self.message, "type": kind, "param": self.param, "code": self.code,
        }})
        .to_string()
        .into_bytes()
    }

    /// The whole response.
    pub(super) fn to_response(&self) -> Response<Body> {
        let mut response = Response::new(Body::full(self.to_json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(RETRY_AFTER, self.after_s.unwrap_or(1).into());
            }
            _ => {}
        }
        if let Some(allow) = self.allow {
            headers.insert(ALLOW, HeaderValue::from_static(allow));
        }
        response
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        let (status, code) = match failure.kind {
            FailureKind::Invalid => (StatusCode::BAD_REQUEST, "invalid_request"),
            FailureKind::NoModel => (StatusCode::NOT_FOUND, "model_not_found"),
            FailureKind::Busy => (StatusCode::SERVICE_UNAVAILABLE, "overloaded"),
            FailureKind::Deadline => (StatusCode::GATEWAY_TIMEOUT, "timeout"),
            FailureKind::Cancelled => (StatusCode::SERVICE_UNAVAILABLE, "cancelled"),
            FailureKind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal_error"),
            FailureKind::Budget { .. } => (StatusCode::TOO_MANY_REQUESTS, "insufficient_quota"),
            FailureKind::Rate { .. } => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded"),
            FailureKind::Unbooked => (StatusCode::SERVICE_UNAVAILABLE, "accounts_unavailable"),
            FailureKind::Upstream => (StatusCode::BAD_GATEWAY, "upstream_error"),
        };
        let after_s = match failure.kind {
            FailureKind::Budget { after_s } | FailureKind::Rate { after_s } => Some(after_s),
            FailureKind::Unbooked => Some(2),
            _ => None,
        };
        ApiError { after_s, ..ApiError::new(status, code, failure.message) }
    }
}
