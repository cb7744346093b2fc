//! How an answer's tokens are chosen, and where it ends.
use super::{Api, draw};
use crate::gateway::error::ApiError;
use crate::gateway::fields::{Fields, wrong_type};
use serde_json::Value;
use weir_scheduler::Sampling;

/// Most tokens of a legacy completion whose request doesn't say.
const COMPLETION_TOKENS: u32 = 16;

pub(super) fn sampling(api: Api, fields: &mut Fields) -> Result<Sampling, ApiError> {
    let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0);
    let repetition_penalty = fields.number("repetition_penalty", 0.0..=100.0)?.unwrap_or(1.0);
    if repetition_penalty < f32::MIN_POSITIVE {
        return Err(ApiError::field(
            "repetition_penalty",
            "decimal_below_min_value",
            "Invalid 'repetition_penalty': it must be above 0; 1 is off.",
        ));
    }
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
        // -1 is how some write "all".
        top_k: fields.integer("top_k", -1..=i64::from(u32::MAX))?.unwrap_or(0).max(0) as u32,
        // 0 means the likeliest token alone.
        top_p: top_p.max(f32::MIN_POSITIVE),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
        repetition_penalty,
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        seed: seed(fields)?.unwrap_or_else(draw),
        logit_bias: logit_bias(fields)?,
        logprobs: logprobs(api, fields)?,
    })
}

fn seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.take("seed") else { return Ok(None) };
    // A negative seed is as good as any other.
    let seed = value.as_u64().or_else(|| value.as_i64().map(|n| n as u64));
    seed.map(Some).ok_or_else(|| wrong_type("seed", "an integer", &value))
}

/// The seed of the `choice`th answer to one prompt; the first has the request's own.
pub(in crate::gateway) fn choice_seed(seed: u64, choice: usize) -> u64 {
    // SplitMix64's increment and finaliser, so that neighbours have nothing in common.
    if choice == 0 {
        return seed;
    }
    let mut z = seed.wrapping_add((choice as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let map = map.into_map();
    let bad = |what: String| {
        ApiError::field("logit_bias", "invalid_value", format!("Invalid 'logit_bias': {what}."))
    };
    if map.len() > 1024 {
        return Err(bad(format!("{} entries, at most 1024 are taken", map.len())));
    }
    map.into_iter()
        .map(|(key, value)| {
            let id = key.parse().map_err(|_| bad("keys must be token ids".into()))?;
            let bias = value.as_f64().filter(|b| (-100.0..=100.0).contains(b));
            bias.map(|b| (id, b as f32))
                .ok_or_else(|| bad(format!("the bias of {id} must be a number in -100..=100")))
        })
        .collect()
}

fn logprobs(api: Api, fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    if api == Api::Completion {
        return Ok(fields.integer("logprobs", 0..=20)?.map(|n| n as u8));
    }
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=20)?;
    if top.is_some_and(|n| n > 0) && !wanted {
        return Err(ApiError::field(
            "top_logprobs",
            "invalid_value",
            "Invalid 'top_logprobs': it is only allowed when 'logprobs' is true.",
        ));
    }
    Ok(wanted.then(|| top.unwrap_or(0) as u8))
}

pub(super) fn max_tokens(api: Api, fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let range = 1..=i64::from(u32::MAX);
    let old = fields.integer("max_tokens", range.clone())?;
    let new = if api != Api::Completion { fields.integer("max_completion_tokens", range)? } else { None };
    let asked = new.or(old).map(|n| n as u32);
    Ok(match api {
        Api::Completion => Some(asked.unwrap_or(COMPLETION_TOKENS)),
        _ => asked,
    })
}

pub(super) fn stop(api: Api, fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let strings = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(s)) => vec![s],
        Some(Value::Array(items)) => items
            .into_iter()
            .map(|item| match item {
                Value::String(s) => Ok(s),
                other => Err(wrong_type("stop", "a string or an array of strings", &other)),
            })
            .collect::<Result<_, _>>()?,
        Some(other) => return Err(wrong_type("stop", "a string or an array of strings", &other)),
    };
    let bad = |what: &str| ApiError::field("stop", "invalid_value", format!("Invalid 'stop': {what}."));
    match &strings {
        // Anthropic's have their own bound.
        s if s.len() > 4 && api != Api::Messages => Err(bad("at most 4 strings are taken")),
        s if s.iter().any(String::is_empty) => Err(bad("a stop string can't be empty")),
        s if s.iter().any(|s| s.len() > 1024) => Err(bad("a stop string can't be longer than 1024 bytes")),
        _ => Ok(strings),
    }
}
