//! The `weir` object of a request, which every API has.
use crate::gateway::error::ApiError;
use crate::gateway::fields::Fields;
use serde_json::Value;
use std::time::Duration;
use weir_scheduler::{Class, Priority};

/// The `weir` object: who goes first, labels that policies look at, how long the first token may take, what all may cost, and
/// a class of models that counts instead of the model that is named: many programs can only name one.
#[derive(Default)]
pub(super) struct WeirOptions {
    pub(super) priority: Priority,
    pub(super) tags: Vec<(String, String)>,
    pub(super) ttft: Option<Duration>,
    /// Billionths of a dollar.
    pub(super) max_cost: Option<u64>,
    pub(super) class: Option<Class>,
    /// Names of models.
    pub(super) otherwise: Vec<String>,
}

/// Models that a request may name beside its own.
const OTHERWISE_MAX: usize = 8;

pub(super) fn weir_options(fields: &mut Fields) -> Result<WeirOptions, ApiError> {
    let Some(mut options) = fields.object("weir")? else { return Ok(WeirOptions::default()) };
    let within = |error: ApiError| error.within("weir");
    let priority = match options.string("priority").map_err(within)?.as_deref() {
        None | Some("normal") => Priority::Normal,
        Some("interactive") => Priority::Interactive,
        Some("background") => Priority::Background,
        Some(_) => {
            return Err(ApiError::field(
                "weir.priority",
                "invalid_value",
                "Invalid 'weir.priority': expected 'interactive', 'normal' or 'background'.",
            ));
        }
    };
    let tags = options.object("tags").map_err(within)?.map(Fields::into_map).unwrap_or_default();
    let bad =
        |what: &str| ApiError::field("weir.tags", "invalid_value", format!("Invalid 'weir.tags': {what}."));
    if tags.len() > 32 {
        return Err(bad("at most 32 are taken"));
    }
    let tags = tags
        .into_iter()
        .map(|(name, value)| match value {
            Value::String(v) if name.len() <= 64 && v.len() <= 256 => Ok((name, v)),
            _ => Err(bad("names up to 64 bytes, values strings up to 256 bytes")),
        })
        .collect::<Result<_, _>>()?;
    let ttft = options.integer("ttft_ms", 1..=86_400_000).map_err(within)?;
    let max_usd = options.number("max_usd", 0.0..=1e6).map_err(within)?;
    let class = match options.string("model_size").map_err(within)? {
        None => None,
        Some(name) => Some(Class::named(&name).ok_or_else(|| {
            let message = "Invalid 'weir.model_size': expected 'small', 'medium', 'large' or 'auto'.";
            ApiError::field("weir.model_size", "invalid_value", message)
        })?),
    };
    let mut otherwise = Vec::new();
    for name in options.array("otherwise").map_err(within)?.unwrap_or_default() {
        match name {
            Value::String(name) if otherwise.len() < OTHERWISE_MAX => otherwise.push(name),
            _ => {
                let message =
                    format!("Invalid 'weir.otherwise': expected at most {OTHERWISE_MAX} names of models.");
                return Err(ApiError::field("weir.otherwise", "invalid_value", message));
            }
        }
    }
    Ok(WeirOptions {
        priority,
        tags,
        ttft: ttft.map(|ms| Duration::from_millis(ms as u64)),
        max_cost: max_usd.map(|usd| (f64::from(usd) * 1e9).round() as u64),
        class,
        otherwise,
    })
}
