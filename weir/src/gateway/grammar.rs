//! Whether a grammar that a request makes can be followed, before anybody is asked to: a hostile schema costs its sender a
//! 400, and the rest of us at most two threads for a while.
use super::error::ApiError;
use super::prompt::Encoded;
use hyper::StatusCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// Grammars that are compiled at once.
static COMPILING: Semaphore = Semaphore::const_new(2);
/// For one, its wait for others included. Real ones take milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Those of prompts that have one.
pub(super) async fn check_all(prompts: &[Encoded]) -> Result<(), ApiError> {
    for (grammar, about) in prompts.iter().filter_map(|prompt| prompt.grammar.clone()) {
        check(grammar, about).await?;
    }
    Ok(())
}

/// `about` is the field that it was made of.
async fn check(grammar: Arc<str>, about: &'static str) -> Result<(), ApiError> {
    let compiled = async {
        let permit = COMPILING.acquire().await;
        let compile = move || {
            let _permit = permit;
            weir_backends::grammar::check(&grammar)
        };
        spawn_blocking(compile).await
    };
    match timeout(PATIENCE, compiled).await {
        Ok(Ok(Ok(()))) => Ok(()),
        Ok(Ok(Err(error))) => {
            let message = format!("Invalid schema in '{about}': {error}.");
            Err(ApiError::field(about, "invalid_json_schema", message))
        }
        // It panicked, which is a bug, or the runtime is going down.
        Ok(Err(_)) => {
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            Err(ApiError::new(status, "internal_error", "The request's schema could not be read."))
        }
        Err(_) => {
            let seconds = PATIENCE.as_secs();
            let message = format!(
                "Invalid schema in '{about}': it takes more than {seconds} s to compile; a simpler one is needed."
            );
            Err(ApiError::field(about, "schema_too_complex", message))
        }
    }
}
