//! A row for each request that has ended, and sums of a day for those of long ago.
use crate::state::{State, StateError, Table};
use redb::{ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const ROWS: Table<u64> = TableDefinition::new("usage");
const DAYS: Table<&str> = TableDefinition::new("usage_days");
/// Rows are kept for so long, and no more than that many; then they are added up by day.
const ROWS_KEPT_MS: u64 = 30 * DAY_MS;
const ROWS_MAX: u64 = 500_000;
/// The same of days' sums; the oldest are forgotten.
const DAYS_KEPT: u64 = 800;
const DAYS_MAX: u64 = 200_000;
/// Rows that are added up in one commit, at most; and rows written between two looks at whether it is time.
const ROLLED_AT_ONCE: usize = 20_000;
const LOOK_EVERY: u64 = 5000;
const DAY_MS: u64 = 86_400_000;
/// Bits of a row's number below its time.
const SERIAL_BITS: u32 = 20;
/// Characters of a text that are kept.
const TEXT_MAX: usize = 200;

/// A request that has ended. A call of an API for `n` answers is `n` of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// When it ended, in milliseconds since 1970.
    pub at_ms: u64,
    /// The name of its key; empty where it had none.
    pub key: String,
    /// Its tags.
    pub tags: Vec<(String, String)>,
    /// The model that it asked for.
    pub model: String,
    /// The nodes that took part, first to last.
    pub nodes: Vec<String>,
    /// Tokens of its prompt.
    pub prompt_tokens: u64,
    /// Tokens of output.
    pub output_tokens: u64,
    /// What it cost, in billionths of a dollar.
    pub nano_usd: u64,
    /// Some of that by our own count.
    pub estimated: bool,
    /// How it ended: `stop`, `length`, or why it failed.
    pub end: String,
}

/// By what rows are added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// The key's name.
    Key,
    /// The model.
    Model,
    /// The nodes that took part.
    Node,
    /// Each tag; a request with several is in several sums.
    Tag,
    /// The day, in UTC.
    Day,
}

/// What requests took together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sum {
    /// Whose.
    #[serde(default)]
    pub name: String,
    /// How many.
    pub requests: u64,
    /// Of those, the ones that failed or were cancelled.
    pub failed: u64,
    /// Tokens of their prompts.
    pub prompt_tokens: u64,
    /// Tokens of output.
    pub output_tokens: u64,
    /// What they cost, in billionths of a dollar.
    pub nano_usd: u64,
}

impl Sum {
    fn add(&mut self, other: &Sum) {
        self.requests += other.requests;
        self.failed += other.failed;
        self.prompt_tokens = self.prompt_tokens.saturating_add(other.prompt_tokens);
        self.output_tokens = self.output_tokens.saturating_add(other.output_tokens);
        self.nano_usd = self.nano_usd.saturating_add(other.nano_usd);
    }
}

/// What a sum of a day is of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Whose {
    key: String,
    tags: Vec<(String, String)>,
    model: String,
    nodes: Vec<String>,
}

impl Row {
    /// With texts no longer than is kept.
    fn short(&self) -> Row {
        let short = |text: &String| text.chars().take(TEXT_MAX).collect::<String>();
        Row {
            tags: self.tags.iter().take(16).map(|(name, value)| (short(name), short(value))).collect(),
            end: short(&self.end),
            ..self.clone()
        }
    }

    fn whose(&self) -> Whose {
        let Row { key, tags, model, nodes, .. } = self.clone();
        Whose { key, tags, model, nodes }
    }

    fn sum(&self) -> Sum {
        Sum {
            name: String::new(),
            requests: 1,
            failed: u64::from(!matches!(self.end.as_str(), "stop" | "length")),
            prompt_tokens: self.prompt_tokens,
            output_tokens: self.output_tokens,
            nano_usd: self.nano_usd,
        }
    }
}

impl Whose {
    /// What it counts as.
    fn names(&self, by: By, day: u64) -> Vec<String> {
        let or = |text: &str, none: &str| if text.is_empty() { none.to_owned() } else { text.to_owned() };
        match by {
            By::Key => vec![or(&self.key, "(no key)")],
            By::Model => vec![self.model.clone()],
            By::Node => vec![or(&self.nodes.join(" > "), "(none)")],
            By::Day => vec![date(day)],
            By::Tag if self.tags.is_empty() => vec!["(no tag)".into()],
            By::Tag => {
                let name = |(name, value): &(String, String)| match value.is_empty() {
                    true => name.clone(),
                    false => format!("{name}={value}"),
                };
                self.tags.iter().map(name).collect()
            }
        }
    }
}

/// `2026-11-24`.
fn date(day: u64) -> String {
    let second = i64::try_from(day).unwrap_or(0).saturating_mul(86_400);
    jiff::Timestamp::from_second(second).map(|at| at.strftime("%Y-%m-%d").to_string()).unwrap_or_default()
}

/// The rows on disk. Cheap to clone.
#[derive(Clone)]
pub(super) struct Log {
    state: State,
    /// Rows written by this process.
    written: Arc<AtomicU64>,
}

impl Log {
    pub fn open(state: State, unix_s: i64) -> Result<Log, StateError> {
        let log = Log { state, written: Arc::default() };
        log.roll(u64::try_from(unix_s).unwrap_or(0).saturating_mul(1000))?;
        Ok(log)
    }

    /// Puts rows on disk.
    pub fn append(&self, rows: &[Row]) -> Result<(), StateError> {
        let Some(last) = rows.last().map(|row| row.at_ms) else { return Ok(()) };
        let before = self.written.fetch_add(rows.len() as u64, Ordering::Relaxed);
        self.state.told(|| {
            let write = self.state.database().begin_write()?;
            {
                let mut table = write.open_table(ROWS)?;
                let serials = before..;
                for (row, serial) in rows.iter().zip(serials) {
                    let number = (row.at_ms << SERIAL_BITS) | (serial & ((1 << SERIAL_BITS) - 1));
                    let json =
                        serde_json::to_vec(&row.short()).expect("strings and numbers always serialise");
                    table.insert(number, json.as_slice())?;
                }
            }
            Ok(write.commit()?)
        })?;
        if before / LOOK_EVERY != (before + rows.len() as u64) / LOOK_EVERY {
            self.roll(last)?;
        }
        Ok(())
    }

    /// Adds up rows of long ago, and those that are too many.
    fn roll(&self, now_ms: u64) -> Result<(), StateError> {
        let old = now_ms.saturating_sub(ROWS_KEPT_MS) << SERIAL_BITS;
        while self.state.told(|| self.roll_some(old, now_ms / DAY_MS))? {}
        Ok(())
    }

    /// Whether there is more to do.
    fn roll_some(&self, old: u64, today: u64) -> crate::state::Tried<bool> {
        let write = self.state.database().begin_write()?;
        let rolled = {
            let (mut rows, mut days) = (write.open_table(ROWS)?, write.open_table(DAYS)?);
            let spare = usize::try_from(rows.len()?.saturating_sub(ROWS_MAX)).unwrap_or(usize::MAX);
            let mut sums: BTreeMap<String, Sum> = BTreeMap::new();
            let mut gone = Vec::new();
            for (place, entry) in rows.iter()?.take(ROLLED_AT_ONCE).enumerate() {
                let (number, value) = entry?;
                if number.value() >= old && place >= spare {
                    break;
                }
                gone.push(number.value());
                let Ok(row) = serde_json::from_slice::<Row>(value.value()) else { continue };
                let whose = serde_json::to_string(&row.whose()).expect("strings always serialise");
                sums.entry(format!("{:08} {whose}", row.at_ms / DAY_MS)).or_default().add(&row.sum());
            }
            for (name, sum) in &mut sums {
                if let Some(before) = days.get(name.as_str())?
                    && let Ok(before) = serde_json::from_slice(before.value())
                {
                    sum.add(&before);
                }
                let json = serde_json::to_vec(sum).expect("numbers always serialise");
                days.insert(name.as_str(), json.as_slice())?;
            }
            for number in &gone {
                rows.remove(number)?;
            }
            let first = format!("{:08}", today.saturating_sub(DAYS_KEPT));
            let mut spare = days.len()?.saturating_sub(DAYS_MAX);
            let mut forgotten = Vec::new();
            for entry in days.iter()? {
                let (name, _) = entry?;
                if name.value() >= first.as_str() && spare == 0 {
                    break;
                }
                spare = spare.saturating_sub(1);
                forgotten.push(name.value().to_owned());
            }
            for name in forgotten {
                days.remove(name.as_str())?;
            }
            gone.len()
        };
        write.commit()?;
        Ok(rolled == ROLLED_AT_ONCE)
    }

    /// Rows from a time on, added up; of those that are sums already, whole days.
    pub fn sums(&self, since_ms: u64, by: By) -> Result<Vec<Sum>, StateError> {
        let mut sums: BTreeMap<String, Sum> = BTreeMap::new();
        let mut add = |whose: &Whose, day: u64, sum: &Sum| {
            for name in whose.names(by, day) {
                sums.entry(name).or_default().add(sum);
            }
        };
        self.state.told(|| {
            let read = self.state.database().begin_read()?;
            for entry in read.open_table(DAYS)?.range(format!("{:08}", since_ms / DAY_MS).as_str()..)? {
                let (name, value) = entry?;
                let Some((day, whose)) = name.value().split_once(' ') else { continue };
                if let (Ok(day), Ok(whose), Ok(sum)) =
                    (day.parse(), serde_json::from_str(whose), serde_json::from_slice(value.value()))
                {
                    add(&whose, day, &sum);
                }
            }
            for entry in read.open_table(ROWS)?.range(since_ms << SERIAL_BITS..)? {
                let Ok(row) = serde_json::from_slice::<Row>(entry?.1.value()) else { continue };
                add(&row.whose(), row.at_ms / DAY_MS, &row.sum());
            }
            Ok(())
        })?;
        Ok(sums.into_iter().map(|(name, sum)| Sum { name, ..sum }).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(at_ms: u64, key: &str, nano_usd: u64) -> Row {
        let tags = vec![("team".into(), "red".into())];
        let (model, nodes) = ("m".into(), vec!["n".into()]);
        let row = Row {
            at_ms,
            key: key.into(),
            tags,
            model,
            nodes,
            nano_usd,
            end: "stop".into(),
            ..Row::default()
        };
        Row { prompt_tokens: 2, output_tokens: 3, ..row }
    }

    #[test]
    fn rows_are_added_up_and_old_ones_by_day() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(State::open(folder.path()).unwrap(), 0).unwrap();
        let rows: Vec<Row> =
            (0..100).map(|n| row(n * DAY_MS, if n % 2 == 0 { "a" } else { "" }, n)).collect();
        log.append(&rows).unwrap();
        let sums = |since, by| log.sums(since, by).unwrap();
        let check = || {
            let all = sums(0, By::Key);
            assert_eq!(
                all.iter().map(|s| (s.name.as_str(), s.requests)).collect::<Vec<_>>(),
                [("(no key)", 50), ("a", 50)]
            );
            assert_eq!(all.iter().map(|s| s.nano_usd).sum::<u64>(), 99 * 50);
            assert_eq!(sums(90 * DAY_MS, By::Model)[0].requests, 10);
            assert_eq!(sums(0, By::Tag)[0].name, "team=red");
            assert_eq!(sums(0, By::Node)[0].output_tokens, 300);
            assert_eq!((sums(0, By::Day).len(), sums(0, By::Day)[1].name.as_str()), (100, "1970-01-02"));
        };
        check();
        log.roll(100 * DAY_MS).unwrap();
        let kept = log.state.all::<_, Row, _>(ROWS, |number| number).unwrap().len();
        assert_eq!(kept, 30, "the rest are sums of a day");
        check();
        log.roll(2000 * DAY_MS).unwrap();
        assert_eq!(sums(0, By::Key), [], "sums are forgotten at last");
    }
}
