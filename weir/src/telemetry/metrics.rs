//! Metrics: what they are, and those that are counted as things happen.
use super::names::{self, Conventions};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Label sets of one metric, at most; further ones are counted as `_OTHER`.
const SERIES_MAX: usize = 1000;
/// Bytes of a label's value, at most.
const LABEL_MAX: usize = 128;
/// Between the values of a key: in no label's value.
const BETWEEN: char = '\u{1f}';

/// A metric, in OpenTelemetry's spelling.
#[derive(Debug)]
pub(crate) struct Metric {
    pub name: &'static str,
    /// UCUM.
    pub unit: &'static str,
    pub kind: Kind,
    pub help: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// Only grows.
    Counter,
    /// As it is now.
    Gauge,
    /// With these boundaries.
    Histogram(&'static [f64]),
}

/// A metric and its values at one moment.
#[derive(Clone, Debug)]
pub struct Family {
    pub(crate) metric: &'static Metric,
    pub(crate) series: Vec<Series>,
}

#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub labels: Vec<(&'static str, String)>,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Number(f64),
    Histogram(Histogram),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Histogram {
    pub bounds: &'static [f64],
    /// One more than bounds: each counts what is no more than its bound and more than the one before.
    pub counts: Vec<u64>,
    pub sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Histogram {
        Histogram { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    fn observe(&mut self, value: f64) {
        self.counts[self.bounds.partition_point(|bound| *bound < value)] += 1;
        self.sum += value;
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

impl Family {
    pub(crate) fn new(metric: &'static Metric) -> Family {
        Family { metric, series: Vec::new() }
    }

    /// One value more.
    pub(crate) fn with(mut self, labels: &[(&'static str, &str)], value: f64) -> Family {
        self.push(labels, value);
        self
    }

    pub(crate) fn push(&mut self, labels: &[(&'static str, &str)], value: f64) {
        let labels = labels.iter().map(|(name, value)| (*name, clean(value))).collect();
        self.series.push(Series { labels, value: Value::Number(value) });
    }
}

/// A value that fits a label.
fn clean(value: &str) -> String {
    let mut clean: String = value.chars().filter(|c| !c.is_control()).collect();
    if clean.len() > LABEL_MAX {
        let end = (0..=LABEL_MAX).rev().find(|at| clean.is_char_boundary(*at)).unwrap_or(0);
        clean.truncate(end);
    }
    clean
}

/// The values of one metric by its labels.
pub(crate) struct Table {
    metric: &'static Metric,
    labels: &'static [&'static str],
    series: Mutex<BTreeMap<String, Value>>,
}

impl Table {
    fn new(metric: &'static Metric, labels: &'static [&'static str]) -> Table {
        Table { metric, labels, series: Mutex::default() }
    }

    fn series(&self) -> MutexGuard<'_, BTreeMap<String, Value>> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `values` are of the labels, in their order.
    pub fn add(&self, values: &[&str], amount: f64) {
        self.change(values, |value| match value {
            Value::Number(number) => *number += amount,
            Value::Histogram(histogram) => histogram.observe(amount),
        });
    }

    fn change(&self, values: &[&str], how: impl FnOnce(&mut Value)) {
        debug_assert_eq!(values.len(), self.labels.len());
        let mut key = String::with_capacity(64);
        for (number, value) in values.iter().enumerate() {
            if number > 0 {
                key.push(BETWEEN);
            }
            match value.len() <= LABEL_MAX && !value.chars().any(char::is_control) {
                true => key.push_str(value),
                false => key.push_str(&clean(value)),
            }
        }
        let mut series = self.series();
        if series.len() >= SERIES_MAX && !series.contains_key(&key) {
            key = vec![names::OTHER; self.labels.len()].join(&BETWEEN.to_string());
        }
        let new = || match self.metric.kind {
            Kind::Histogram(bounds) => Value::Histogram(Histogram::new(bounds)),
            Kind::Counter | Kind::Gauge => Value::Number(0.0),
        };
        how(series.entry(key).or_insert_with(new));
    }

    /// As it is now; a label without a value is left out.
    pub fn family(&self) -> Family {
        let series = self.series();
        let one = |(key, value): (&String, &Value)| {
            let labels = self.labels.iter().zip(key.split(BETWEEN)).filter(|(_, value)| !value.is_empty());
            Series { labels: labels.map(|(name, v)| (*name, v.to_owned())).collect(), value: value.clone() }
        };
        Family { metric: self.metric, series: series.iter().map(one).collect() }
    }
}

/// What is counted as it happens.
pub(crate) struct Meters {
    /// By operation, provider, model, error.
    pub server_duration: Table,
    /// By operation, provider, model.
    pub server_first: Table,
    pub server_pace: Table,
    /// By operation, provider, model, error.
    pub client_duration: Table,
    /// By operation, provider, model, type.
    pub client_tokens: Table,
    /// By operation, model.
    pub active: Table,
    /// By route, status.
    pub responses: Table,
    /// By node, kind.
    pub placements: Table,
    /// By node, error.
    pub failovers: Table,
    pub hedges: Table,
    /// By error.
    pub refusals: Table,
    /// By provider, model, node.
    pub spent: Table,
}

impl Default for Meters {
    fn default() -> Meters {
        Meters::new(Conventions::default())
    }
}

impl Meters {
    pub fn new(conventions: Conventions) -> Meters {
        use names::*;
        let is_new = conventions.is_new();
        let call: &[&str] =
            if is_new { &[OPERATION, PROVIDER, REQUEST_MODEL] } else { &[OPERATION, SYSTEM, REQUEST_MODEL] };
        let ended: &[&str] = if is_new {
            &[OPERATION, PROVIDER, REQUEST_MODEL, ERROR]
        } else {
            &[OPERATION, SYSTEM, REQUEST_MODEL, ERROR]
        };
        let used: &[&str] = if is_new {
            &[OPERATION, PROVIDER, REQUEST_MODEL, TOKEN_TYPE]
        } else {
            &[OPERATION, SYSTEM, REQUEST_MODEL, TOKEN_TYPE]
        };
        let meters = Meters {
            server_duration: Table::new(&SERVER_DURATION, ended),
            server_first: Table::new(&SERVER_FIRST, call),
            server_pace: Table::new(&SERVER_PACE, call),
            client_duration: Table::new(&CLIENT_DURATION, ended),
            client_tokens: Table::new(&CLIENT_TOKENS, used),
            active: Table::new(&ACTIVE, &[OPERATION, REQUEST_MODEL]),
            responses: Table::new(&RESPONSES, &[L_ROUTE, L_STATUS]),
            placements: Table::new(&PLACEMENTS, &[L_NODE, L_KIND]),
            failovers: Table::new(&FAILOVERS, &[L_NODE, ERROR]),
            hedges: Table::new(&names::HEDGES, &[]),
            refusals: Table::new(&REFUSALS, &[ERROR]),
            spent: Table::new(&SPENT, &[L_PROVIDER, L_MODEL]),
        };
        // What is 0 is told, too, where it is known beforehand: a rate begins somewhere.
        meters.hedges.add(&[], 0.0);
        ERRORS.iter().for_each(|error| meters.refusals.add(&[error], 0.0));
        meters
    }

    pub fn families(&self) -> Vec<Family> {
        let all = [
            &self.server_duration,
            &self.server_first,
            &self.server_pace,
            &self.client_duration,
            &self.client_tokens,
            &self.active,
            &self.responses,
            &self.placements,
            &self.failovers,
            &self.hedges,
            &self.refusals,
            &self.spent,
        ];
        all.into_iter().map(Table::family).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_bounded_whatever_comes() {
        let table = Table::new(&names::REFUSALS, &[names::ERROR, names::L_NODE]);
        for n in 0..3 * SERIES_MAX {
            table.add(&[&format!("n{n}"), "a\nb\u{1f}c"], 1.0);
        }
        table.add(&[&"x".repeat(1000), ""], 1.0);
        let family = table.family();
        assert_eq!(family.series.len(), SERIES_MAX + 1);
        let total: f64 =
            family.series.iter().map(|s| if let Value::Number(n) = s.value { n } else { 0.0 }).sum();
        assert_eq!(total, 3.0 * SERIES_MAX as f64 + 1.0, "nothing is lost");
        for series in &family.series {
            assert!(series.labels.iter().all(|(_, v)| v.len() <= LABEL_MAX && !v.contains(char::is_control)));
        }
    }

    #[test]
    fn histograms_count_up_to_their_bounds() {
        let mut histogram = Histogram::new(&[1.0, 2.0]);
        [0.5, 1.0, 1.5, 2.0, 2.1].into_iter().for_each(|v| histogram.observe(v));
        assert_eq!((histogram.counts.as_slice(), histogram.count()), ([2, 2, 1].as_slice(), 5));
        assert!((histogram.sum - 7.1).abs() < 1e-9);
    }
}
