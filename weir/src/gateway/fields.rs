//! Reading the fields of a request's JSON object, with OpenAI's words for what is wrong with one.
use super::error::ApiError;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// A JSON object that is taken apart field by field. `null` counts as absent.
pub(super) struct Fields {
    map: Map<String, Value>,
}

impl Fields {
    /// The object in `body`.
    pub(super) fn parse(body: &[u8]) -> Result<Fields, ApiError> {
        let problem = |what: String| {
            ApiError::new(
                hyper::StatusCode::BAD_REQUEST,
                "invalid_json",
                format!("We could not parse the JSON body of your request: {what}."),
            )
        };
        // serde_json refuses more than 128 levels of nesting, NaN, and numbers beyond f64.
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Fields { map }),
            Ok(other) => Err(problem(format!("expected an object, but got {}", describe(&other)))),
            Err(error) => Err(problem(error.to_string())),
        }
    }

    /// Of an object that is there already.
    pub(super) fn of(map: Map<String, Value>) -> Fields {
        Fields { map }
    }

    /// All that is there, as it came.
    pub(super) fn copy(&self) -> Map<String, Value> {
        self.map.clone()
    }

    /// Whether there is such a field.
    pub(super) fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// Whatever the field is.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|v| !v.is_null())
    }

    pub(super) fn boolean(&mut self, name: &'static str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(other) => Err(wrong_type(name, "a boolean", &other)),
        }
    }

    pub(super) fn string(&mut self, name: &'static str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(wrong_type(name, "a string", &other)),
        }
    }

    pub(super) fn array(&mut self, name: &'static str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(a)) => Ok(Some(a)),
            Some(other) => Err(wrong_type(name, "an array", &other)),
        }
    }

    pub(super) fn object(&mut self, name: &'static str) -> Result<Option<Fields>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { map })),
            Some(other) => Err(wrong_type(name, "an object", &other)),
        }
    }

    pub(super) fn integer(
        &mut self,
        name: &'static str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = match (value.as_i64(), value.as_u64()) {
            (Some(n), _) => n,
            // Larger than any range asked for here.
            (None, Some(_)) => i64::MAX,
            (None, None) => return Err(wrong_type(name, "an integer", &value)),
        };
        within(name, "integer", number, range, &value).map(Some)
    }

    pub(super) fn number(
        &mut self,
        name: &'static str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_f64().ok_or_else(|| wrong_type(name, "a number", &value))?;
        within(name, "decimal", number, range, &value).map(|n| Some(n as f32))
    }

    /// What is left, as it came.
    pub(super) fn into_map(self) -> Map<String, Value> {
        self.map
    }
}

fn within<T: PartialOrd + std::fmt::Display + Copy>(
    name: &'static str,
    kind: &str,
    number: T,
    range: RangeInclusive<T>,
    given: &Value,
) -> Result<T, ApiError> {
    let (side, code, relation, bound) = if number < *range.start() {
        let code = if kind == "integer" { "integer_below_min_value" } else { "decimal_below_min_value" };
        ("below minimum", code, ">=", range.start())
    } else if number > *range.end() {
        let code = if kind == "integer" { "integer_above_max_value" } else { "decimal_above_max_value" };
        ("above maximum", code, "<=", range.end())
    } else {
        return Ok(number);
    };
    Err(ApiError::field(
        name,
        code,
        format!(
            "Invalid '{name}': {kind} {side} value. Expected a value {relation} {bound}, but got {given} instead."
        ),
    ))
}

/// 400: `name` should have been `expected`.
pub(super) fn wrong_type(name: impl Into<String>, expected: &str, got: &Value) -> ApiError {
    let name = name.into();
    let message =
        format!("Invalid type for '{name}': expected {expected}, but got {} instead.", describe(got));
    ApiError::field(name, "invalid_type", message)
}

fn describe(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(n) if n.is_f64() => "a decimal",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
