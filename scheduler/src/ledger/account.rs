//! Whose money, of which kind, and in what time.
use std::fmt;
use std::sync::Arc;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unit {
    /// Billionths of a dollar.
    NanoUsd,
    /// Tokens of prompts and output.
    Tokens,
    /// Requests; an API's call for `n` answers is `n` of them.
    Requests,
}

/// A window of time after which an account begins anew. All are UTC's: an hour begins at minute 0, a day at midnight, a
/// month on its first day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Period {
    /// A rate; what it has counted doesn't outlive the process.
    Minute,
    /// 60 minutes.
    Hour,
    /// 24 hours.
    Day,
    /// A calendar month.
    Month,
}

const DAY_S: i64 = 86_400;

impl Period {
    /// Each of them.
    pub const ALL: [Period; 4] = [Period::Minute, Period::Hour, Period::Day, Period::Month];

    /// The number of the window that a second since 1970 is in; later windows have higher ones.
    pub fn window(self, unix_s: i64) -> i64 {
        match self {
            Period::Minute => unix_s.div_euclid(60),
            Period::Hour => unix_s.div_euclid(3600),
            Period::Day => unix_s.div_euclid(DAY_S),
            Period::Month => months(unix_s.div_euclid(DAY_S)),
        }
    }

    /// The second at which a window begins.
    pub fn begins(self, window: i64) -> i64 {
        match self {
            Period::Minute => window.saturating_mul(60),
            Period::Hour => window.saturating_mul(3600),
            Period::Day => window.saturating_mul(DAY_S),
            Period::Month => first_day(window).saturating_mul(DAY_S),
        }
    }

    /// As people write it: `minute`, `hour`, `day`, `month`.
    pub fn name(self) -> &'static str {
        match self {
            Period::Minute => "minute",
            Period::Hour => "hour",
            Period::Day => "day",
            Period::Month => "month",
        }
    }

    /// The one of that name.
    pub fn named(name: &str) -> Option<Period> {
        Period::ALL.into_iter().find(|period| period.name() == name)
    }
}

/// Months from January 1970 to the one that a day (since 1970) is in: days are counted from 1 March of the year 0, so that
/// leap days come last (Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn months(day: i64) -> i64 {
    let day = day + 719_468;
    let era = day.div_euclid(146_097);
    let of_era = day.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    // March of the year 0 is the third month of that year.
    (era * 400 + year) * 12 + month + 2 - 1970 * 12
}

/// The first day (since 1970) of a month (since January 1970).
fn first_day(month: i64) -> i64 {
    let from_march = month.saturating_add(1970 * 12 - 2);
    let (year, month) = (from_march.div_euclid(12), from_march.rem_euclid(12));
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * month + 2) / 5;
    era.saturating_mul(146_097) + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// Whose account it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Holder {
    /// Of the API key of this name.
    Key(Arc<str>),
    /// Of requests with this tag of this value.
    Tag(Arc<str>, Arc<str>),
    /// Of all requests together.
    Everybody,
}

/// What is counted together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Account {
    /// Whose.
    pub holder: Holder,
    /// What is counted.
    pub unit: Unit,
    /// For how long.
    pub period: Period,
}

/// How much of what may be had in each window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Limit {
    /// So much.
    pub amount: u64,
    /// Of this.
    pub unit: Unit,
    /// In so long.
    pub period: Period,
}

/// For whom a limit is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// Requests with the API key of this name.
    Key(Arc<str>),
    /// Requests with this tag, of this value where one is given; each value has an account of its own where none is.
    Tag(Arc<str>, Option<Arc<str>>),
    /// All requests together.
    Everybody,
}

/// What somebody may spend. Where several limits are for one account, the least holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// Who.
    pub who: Who,
    /// How much.
    pub limit: Limit,
}

impl Unit {
    /// So much of it, for a person.
    pub fn say(self, amount: u64) -> impl fmt::Display {
        Said(self, amount)
    }
}

struct Said(Unit, u64);

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Two digits where they say it all, else as many as there are.
            Said(Unit::NanoUsd, nano) if nano % 10_000_000 == 0 => write!(f, "${:.2}", *nano as f64 / 1e9),
            Said(Unit::NanoUsd, nano) => write!(f, "${:.6}", *nano as f64 / 1e9),
            Said(Unit::Tokens, tokens) => write!(f, "{tokens} tokens"),
            Said(Unit::Requests, requests) => write!(f, "{requests} requests"),
        }
    }
}

impl fmt::Display for Limit {
    /// As people write it: `5usd/day`, `100000tokens/hour`, `60/minute`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let period = self.period.name();
        match self.unit {
            Unit::NanoUsd => {
                let usd = format!("{}.{:09}", self.amount / 1_000_000_000, self.amount % 1_000_000_000);
                write!(f, "{}usd/{period}", usd.trim_end_matches('0').trim_end_matches('.'))
            }
            Unit::Tokens => write!(f, "{}tokens/{period}", self.amount),
            Unit::Requests => write!(f, "{}/{period}", self.amount),
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Key(name) => write!(f, "the key `{name}`"),
            Holder::Tag(name, value) if value.is_empty() => write!(f, "the tag `{name}`"),
            Holder::Tag(name, value) => write!(f, "the tag `{name}={value}`"),
            Holder::Everybody => f.write_str("everybody together"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_turn_when_calendars_say_so() {
        // 2026-02-28T23:59:59Z and the second after; 2028-02-29 exists.
        let last = 1_772_323_199;
        for period in Period::ALL {
            assert_eq!(period.window(last) + 1, period.window(last + 1), "{period:?}");
            assert_eq!(period.begins(period.window(last + 1)), last + 1, "{period:?}");
        }
        assert_eq!(Period::Month.window(0), 0);
        assert_eq!(Period::Month.window(last), 56 * 12 + 1);
        assert_eq!(Period::Month.begins(58 * 12 + 2) - Period::Month.begins(58 * 12 + 1), 29 * DAY_S);
        for day in (-800_000..800_000).step_by(7) {
            let month = months(day);
            assert!(first_day(month) <= day && day < first_day(month + 1), "day {day} in month {month}");
        }
    }

    #[test]
    fn limits_read_as_they_are_written() {
        let limit = |amount, unit| Limit { amount, unit, period: Period::Day }.to_string();
        assert_eq!(limit(5_000_000_000, Unit::NanoUsd), "5usd/day");
        assert_eq!(limit(50_000_000, Unit::NanoUsd), "0.05usd/day");
        assert_eq!(limit(0, Unit::NanoUsd), "0usd/day");
        assert_eq!(limit(7, Unit::Tokens), "7tokens/day");
        assert_eq!(limit(7, Unit::Requests), "7/day");
        assert_eq!(Unit::NanoUsd.say(1_500_000_000).to_string(), "$1.50");
        assert_eq!(Unit::NanoUsd.say(1_500).to_string(), "$0.000002");
    }
}
