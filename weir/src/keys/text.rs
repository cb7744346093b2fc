//! Limits and tags as people write them.
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use weir_scheduler::{Limit, Period, Unit};

/// A limit as it is written: `5usd/day`, `100000tokens/hour`, `60/minute`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bound(pub Limit);

/// Dollars, at most: beyond them a budget is a slip of the pen.
const USD_MAX: u64 = 1_000_000_000;
const NANO: u64 = 1_000_000_000;

impl Bound {
    /// What may be spent: dollars or tokens, in an hour, a day or a month.
    pub fn budget(text: &str) -> Result<Bound, String> {
        let bound: Bound = text.parse()?;
        match bound.0 {
            Limit { unit: Unit::Requests, .. } | Limit { period: Period::Minute, .. } => Err(format!(
                "{text:?} is a rate; a budget is written as 5usd/day, 0.50usd/hour or 100000tokens/month"
            )),
            _ => Ok(bound),
        }
    }

    /// How fast: requests or tokens in a minute.
    pub fn rate(text: &str) -> Result<Bound, String> {
        let bound: Bound = text.parse()?;
        match bound.0 {
            Limit { unit: Unit::Requests | Unit::Tokens, period: Period::Minute, .. } => Ok(bound),
            _ => Err(format!("{text:?} is no rate; write it as 60/minute or 20000tokens/minute")),
        }
    }
}

impl FromStr for Bound {
    type Err = String;

    fn from_str(text: &str) -> Result<Bound, String> {
        let wrong = || format!("{text:?} is no limit; write it as 5usd/day, 100000tokens/hour or 60/minute");
        let (amount, period) = text.split_once('/').ok_or_else(wrong)?;
        let period = Period::named(period).ok_or_else(wrong)?;
        let digits = amount.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(amount.len());
        let (number, unit) = amount.split_at(digits);
        let (unit, amount) = match unit {
            "usd" => (Unit::NanoUsd, nano_usd(number).ok_or_else(wrong)?),
            "tokens" => (Unit::Tokens, number.parse().map_err(|_| wrong())?),
            "" | "requests" => (Unit::Requests, number.parse().map_err(|_| wrong())?),
            _ => return Err(wrong()),
        };
        Ok(Bound(Limit { amount, unit, period }))
    }
}

/// Exactly: no floating point touches money that is written down.
fn nano_usd(number: &str) -> Option<u64> {
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && part.is_empty()) || part.len() > 9 {
        return None;
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let part: u64 = format!("{part:0<9}").parse().ok()?;
    (whole <= USD_MAX).then(|| whole * NANO + part)
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TryFrom<String> for Bound {
    type Error = String;

    fn try_from(text: String) -> Result<Bound, String> {
        text.parse()
    }
}

impl From<Bound> for String {
    fn from(bound: Bound) -> String {
        bound.to_string()
    }
}

/// `NAME` or `NAME=VALUE`.
pub fn tag(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    match name.is_empty() || text.len() > 200 {
        true => Err(format!("{text:?} is no tag; write it as team=red, or private")),
        false => Ok((name.to_owned(), value.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_exactly() {
        for (text, same) in [
            ("5usd/day", "5usd/day"),
            ("0.000000001usd/month", "0.000000001usd/month"),
            (".5usd/hour", "0.5usd/hour"),
            ("100000tokens/hour", "100000tokens/hour"),
            ("60/minute", "60/minute"),
            ("60requests/minute", "60/minute"),
        ] {
            assert_eq!(text.parse::<Bound>().unwrap().to_string(), same);
        }
        for text in [
            "",
            "5",
            "5usd",
            "5/",
            "usd/day",
            ".usd/day",
            "-5usd/day",
            "1e3usd/day",
            "5eur/day",
            "5usd/year",
            "0.0000000001usd/day",
            "1.2.3usd/day",
            "1.5tokens/day",
            "1000000001usd/day",
            "99999999999999999999tokens/day",
        ] {
            assert!(text.parse::<Bound>().is_err(), "{text}");
        }
        assert!(Bound::budget("5usd/day").is_ok() && Bound::rate("60/minute").is_ok());
        assert!(Bound::budget("60/minute").is_err() && Bound::rate("5usd/minute").is_err());
    }

    #[test]
    fn tags_are_read() {
        assert_eq!(tag("team=a=b"), Ok(("team".into(), "a=b".into())));
        assert_eq!(tag("private"), Ok(("private".into(), String::new())));
        assert!(tag("=x").is_err() && tag("").is_err());
    }
}
