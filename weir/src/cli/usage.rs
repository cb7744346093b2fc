//! `weir usage`: what was asked for, and what it cost.
use super::key::{Owner, Place, ask, now_s};
use super::members::time;
use super::output::{note, table};
use crate::books::{Books, By};
use crate::config::Config;
use crate::gateway::{since_ms, sum};
use anyhow::Context;
use clap::ValueEnum;
use hyper::Method;
use serde_json::{Value, json};
use std::io::{Write, stdout};
use std::time::Duration;

/// What was asked for, and what it cost
#[derive(clap::Args)]
#[command(after_help = "\
Requests are kept one by one for 30 days, and then as sums of a day (UTC) for two years. An API's call for n answers counts
as n requests; one with several tags is in the sum of each. Of schedulers that share a cluster each has the rows of those
that it was asked; what `weir key list` says of budgets is of all.

Examples:
  weir usage
  weir usage --since 30d --by model
  weir usage --by day --csv > usage.csv")]
pub(super) struct Usage {
    /// How far back: 12h, 7d, 365d
    #[arg(long, value_name = "TIME", default_value = "7d", value_parser = time)]
    since: Duration,
    /// What is added up
    #[arg(long, value_enum, default_value_t = Each::Key)]
    by: Each,
    /// As comma-separated values
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    #[command(flatten)]
    place: Place,
}

#[derive(Clone, Copy, ValueEnum)]
enum Each {
    Key,
    Model,
    Node,
    Tag,
    Day,
}

impl Each {
    fn by(self) -> By {
        match self {
            Each::Key => By::Key,
            Each::Model => By::Model,
            Each::Node => By::Node,
            Each::Tag => By::Tag,
            Each::Day => By::Day,
        }
    }
}

const COLUMNS: [&str; 5] = ["requests", "failed", "prompt_tokens", "output_tokens", "usd"];

impl Usage {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let (since_s, by) = (self.since.as_secs(), self.by.by());
        let sums: Vec<Value> = match self.place.find(config)? {
            Owner::Running(serving) => {
                let wanted = json!({ "since_s": since_s, "by": by });
                let mut answer = ask(&serving, Method::POST, "usage", Some(&wanted))?;
                if answer["shared"] == true {
                    note(
                        "These requests were asked of this scheduler; the others of its cluster have rows of their own.",
                    );
                }
                serde_json::from_value(answer["usage"].take()).context("what answers is no scheduler")?
            }
            Owner::State(state, _) => {
                let sums = Books::open(state, now_s())?.usage(since_ms(since_s), by)?;
                sums.iter().map(sum).collect()
            }
        };
        let mut out = stdout();
        if self.place.json {
            writeln!(out, "{}", serde_json::to_string_pretty(&sums)?)?;
            return Ok(());
        }
        let name = format!("{by:?}").to_lowercase();
        if self.csv {
            writeln!(out, "{name},{}", COLUMNS.join(","))?;
            for sum in &sums {
                let cells = COLUMNS.map(|column| cell(sum, column));
                writeln!(out, "{},{}", quoted(sum["name"].as_str().unwrap_or_default()), cells.join(","))?;
            }
            return Ok(());
        }
        let head = std::iter::once(name.to_uppercase()).chain(COLUMNS.map(|c| c.to_uppercase())).collect();
        let row = |sum: &Value| {
            let name = sum["name"].as_str().unwrap_or_default().to_owned();
            std::iter::once(name).chain(COLUMNS.map(|column| cell(sum, column))).collect()
        };
        let rows: Vec<Vec<String>> = std::iter::once(head).chain(sums.iter().map(row)).collect();
        table(&mut out, &rows)?;
        Ok(())
    }
}

fn cell(sum: &Value, column: &str) -> String {
    match column {
        "usd" => {
            let nano = sum["nano_usd"].as_u64().unwrap_or(0);
            format!("{}.{:09}", nano / 1_000_000_000, nano % 1_000_000_000)
        }
        column => sum[column].as_u64().unwrap_or(0).to_string(),
    }
}

/// As RFC 4180 says; what spreadsheets would take for a formula is text.
fn quoted(text: &str) -> String {
    let text = match text.starts_with(['=', '+', '-', '@']) {
        true => format!("'{text}"),
        false => text.to_owned(),
    };
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_quoted_where_they_must_be() {
        assert_eq!(quoted("a"), "a");
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
        assert_eq!(quoted("=1+1"), "'=1+1");
        let sum = json!({ "nano_usd": 1_000_000_007u64, "requests": 3 });
        assert_eq!((cell(&sum, "usd"), cell(&sum, "requests")), ("1.000000007".into(), "3".into()));
    }
}
