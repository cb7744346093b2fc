//! OpenAI's `/v1/embeddings`, by providers that have it: a request goes as it came, and its way like every other (policy,
//! budget, retries), and so does the answer. Models on nodes of our own don't embed.
use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use super::parts::Gathered;
use super::request::{Translated, missing};
use super::running::{Running, Total};
use super::write::{Label, weir};
use serde_json::{Map, Value, json};

/// Texts in one request: as many as OpenAI takes.
const INPUTS_MAX: usize = 2048;
/// Fields for the provider.
const SENT: [&str; 4] = ["input", "encoding_format", "dimensions", "user"];

/// A request, of which all the others know that it has a prompt and makes a token.
pub(super) fn read(mut fields: Fields) -> Result<Translated, ApiError> {
    let given = fields.copy();
    match fields.take("input").ok_or_else(|| missing("input"))? {
        Value::String(text) if !text.is_empty() => {}
        Value::Array(all) if (1..=INPUTS_MAX).contains(&all.len()) => {
            let is_input = |one: &Value| one.is_string() || one.is_u64() || one.is_array();
            if let Some(other) = all.iter().find(|one| !is_input(one)) {
                return Err(wrong_type("input", "texts or token ids", other));
            }
        }
        Value::String(_) | Value::Array(_) => {
            let message = format!("Invalid 'input': it must be a text or 1 to {INPUTS_MAX} of them.");
            return Err(ApiError::field("input", "invalid_value", message));
        }
        other => return Err(wrong_type("input", "a string or an array", &other)),
    }
    if let Some(format) = fields.string("encoding_format")?
        && !["float", "base64"].contains(&format.as_str())
    {
        let message = "Invalid 'encoding_format': expected 'float' or 'base64'.";
        return Err(ApiError::field("encoding_format", "invalid_value", message));
    }
    fields.integer("dimensions", 1..=1 << 20)?;
    let sent = SENT.iter().filter_map(|name| Some(((*name).to_owned(), given.get(*name)?.clone())));
    let native: Map<String, Value> = sent.collect();
    let mut asked = Map::from_iter([("prompt".to_owned(), "-".into()), ("max_tokens".to_owned(), 1.into())]);
    for name in ["model", "weir"] {
        asked.extend(fields.take(name).map(|value| (name.to_owned(), value)));
    }
    Ok(Translated { native: Some(native), ..Translated::of(Fields::of(asked)) })
}

/// 400: the model is one of our own.
pub(super) fn refused(model: &str) -> ApiError {
    let message = format!(
        "The model '{model}' makes no embeddings here: ask for one of a provider that has '/v1/embeddings'."
    );
    ApiError::unsupported("model", message)
}

/// The answer.
pub(super) fn whole(label: &Label<'_>, gathered: &Gathered, total: &Total, ran: &Running) -> Vec<u8> {
    let data = gathered.rest.get(weir_upstream::EMBEDDINGS).cloned().unwrap_or_else(|| json!([]));
    let usage = json!({ "prompt_tokens": total.prompt_tokens, "total_tokens": total.prompt_tokens });
    json!({ "object": "list", "data": data, "model": label.model, "usage": usage, "weir": weir(ran) })
        .to_string()
        .into_bytes()
}
