//! What keys and tags may spend: read and checked here, held to by the scheduler's ledger.
use crate::file::Reading;
use serde::Deserialize;
use toml::Spanned;

/// For whom an allowance is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// Requests with the API key of this name.
    Key(String),
    /// Requests with this tag, of this value where one is given; each value has an allowance of its own where none is.
    Tag {
        /// The tag's name.
        name: String,
        /// Its value.
        value: Option<String>,
    },
    /// All requests together.
    Everybody,
}

/// What somebody may spend; without a limit where none. Money is in billionths of a dollar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// Who.
    pub who: Who,
    /// In an hour of the clock.
    pub nano_usd_per_hour: Option<u64>,
    /// In a day.
    pub nano_usd_per_day: Option<u64>,
    /// In a calendar month.
    pub nano_usd_per_month: Option<u64>,
    /// Tokens of prompts and output, in an hour of the clock.
    pub tokens_per_hour: Option<u64>,
    /// In a day.
    pub tokens_per_day: Option<u64>,
    /// In a calendar month.
    pub tokens_per_month: Option<u64>,
    /// A rate.
    pub requests_per_min: Option<u64>,
    /// A rate.
    pub tokens_per_min: Option<u64>,
}

/// As it is written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct BudgetText {
    key: Option<String>,
    tag: Option<String>,
    value: Option<String>,
    everybody: bool,
    usd_per_hour: Option<f64>,
    usd_per_day: Option<f64>,
    usd_per_month: Option<f64>,
    tokens_per_hour: Option<u64>,
    tokens_per_day: Option<u64>,
    tokens_per_month: Option<u64>,
    requests_per_min: Option<u64>,
    tokens_per_min: Option<u64>,
}

/// Dollars, at most: beyond them a budget is a slip of the pen.
const USD_MAX: f64 = 1e9;

impl Reading<'_> {
    pub fn allowance(&mut self, text: &Spanned<BudgetText>) -> Option<Allowance> {
        let (at, b) = (text.span().start, text.get_ref());
        let who = match (&b.key, &b.tag, b.everybody) {
            (Some(key), None, false) if !key.is_empty() => Who::Key(key.clone()),
            (None, Some(tag), false) if !tag.is_empty() => {
                Who::Tag { name: tag.clone(), value: b.value.clone() }
            }
            (None, None, true) => Who::Everybody,
            _ => {
                return self
                    .wrong(at, "a budget is for one of: key = \"NAME\", tag = \"NAME\", everybody = true");
            }
        };
        if b.value.is_some() && b.tag.is_none() {
            return self.wrong(at, "`value` goes with `tag`");
        }
        let mut nano = |name: &str, usd: Option<f64>| match usd {
            Some(usd) if !(0.0..=USD_MAX).contains(&usd) => {
                self.wrong::<u64>(at, &format!("{name} is {usd}; it must be in 0 to {USD_MAX}"))
            }
            usd => usd.map(|usd| (usd * 1e9).round() as u64),
        };
        let allowance = Allowance {
            who,
            nano_usd_per_hour: nano("usd_per_hour", b.usd_per_hour),
            nano_usd_per_day: nano("usd_per_day", b.usd_per_day),
            nano_usd_per_month: nano("usd_per_month", b.usd_per_month),
            tokens_per_hour: b.tokens_per_hour,
            tokens_per_day: b.tokens_per_day,
            tokens_per_month: b.tokens_per_month,
            requests_per_min: b.requests_per_min,
            tokens_per_min: b.tokens_per_min,
        };
        let none = Allowance { who: allowance.who.clone(), ..Allowance::NONE };
        match allowance == none {
            true => {
                self.wrong(at, "this budget limits nothing; give it usd_per_day, requests_per_min or another")
            }
            false => Some(allowance),
        }
    }
}

impl Allowance {
    /// The same as the scheduler knows it.
    pub fn limits(&self) -> Vec<weir_scheduler::Allowance> {
        use weir_scheduler::{Limit, Period, Unit};
        let who = match &self.who {
            Who::Key(name) => weir_scheduler::Who::Key(name.as_str().into()),
            Who::Tag { name, value } => {
                weir_scheduler::Who::Tag(name.as_str().into(), value.as_deref().map(Into::into))
            }
            Who::Everybody => weir_scheduler::Who::Everybody,
        };
        let each = [
            (self.nano_usd_per_hour, Unit::NanoUsd, Period::Hour),
            (self.nano_usd_per_day, Unit::NanoUsd, Period::Day),
            (self.nano_usd_per_month, Unit::NanoUsd, Period::Month),
            (self.tokens_per_hour, Unit::Tokens, Period::Hour),
            (self.tokens_per_day, Unit::Tokens, Period::Day),
            (self.tokens_per_month, Unit::Tokens, Period::Month),
            (self.requests_per_min, Unit::Requests, Period::Minute),
            (self.tokens_per_min, Unit::Tokens, Period::Minute),
        ];
        let limit = |(amount, unit, period): (Option<u64>, _, _)| {
            Some(weir_scheduler::Allowance {
                who: who.clone(),
                limit: Limit { amount: amount?, unit, period },
            })
        };
        each.into_iter().filter_map(limit).collect()
    }

    const NONE: Allowance = Allowance {
        who: Who::Everybody,
        nano_usd_per_hour: None,
        nano_usd_per_day: None,
        nano_usd_per_month: None,
        tokens_per_hour: None,
        tokens_per_day: None,
        tokens_per_month: None,
        requests_per_min: None,
        tokens_per_min: None,
    };
}
