//! What a request is answered with where it is not answered: OpenAI's form of an error.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::reply;

/// An error as clients of OpenAI's API expect it: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    /// The class of error.
    kind: &'static str,
    /// What a program can tell it by.
    code: Option<&'static str>,
    /// The parameter that is to blame.
    param: Option<String>,
    message: String,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, kind, code, param: None, message: message.into() }
    }

    /// Something is wrong with the request.
    pub(super) fn request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message)
    }

    /// Something is wrong with a parameter.
    pub(super) fn param(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::request(message) }
    }

    /// A parameter that is known and cannot be followed.
    pub(super) fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::param(param, message) }
    }

    /// Another status for something that is wrong with the request.
    pub(super) fn with(self, status: StatusCode, code: &'static str) -> Self {
        Self { status, code: Some(code), ..self }
    }

    pub(super) fn no_key() -> Self {
        let message = "this server wants a key: send it as `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", Some("missing_api_key"), message)
    }

    pub(super) fn wrong_key() -> Self {
        let message = "this is not the key of this server";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key"), message)
    }

    /// As many requests as may wait are waiting.
    pub(super) fn busy(queue: usize) -> Self {
        let message = format!("{queue} requests are being answered or wait already; ask again in a moment");
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full"), message)
    }

    /// The server ends.
    pub(super) fn stopping() -> Self {
        let message = "the server is stopping: nothing new is begun, and an answer that is not whole ends here";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("server_stopping"), message)
    }

    /// The computation failed.
    pub(super) fn failed() -> Self {
        let message = "the model could not compute this; the server's log says why";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", Some("internal_error"), message)
    }

    pub(super) fn body(&self) -> serde_json::Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = reply::json(self.status, &self.body());
        let headers = response.headers_mut();
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            // what is left of these requests is not read
            StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}
