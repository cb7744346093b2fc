//! `weir key`: who may ask, and for how much.
use super::members::time;
use super::output::table;
use super::serving::{self, Serving};
use crate::books::Books;
use crate::config::Config;
use crate::etcd::Etcd;
use crate::gateway::{list, with_secret};
use crate::keys::{Bound, Keys, NewKey, tag};
use crate::state::State;
use anyhow::Context;
use clap::Subcommand;
use hyper::Method;
use serde_json::{Value, json};
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// API keys: who may ask, for which models, and for how much
#[derive(clap::Args)]
#[command(after_help = "\
As soon as there is a key, nobody may ask without one (WEIR_API_KEY stays the owner's, without limits). This works while
`weir serve` runs, and on its state folder when it doesn't.

Examples:
  weir key add alice --budget 5usd/day --rate 60/minute
  weir key add ci --budget 100000tokens/hour --model smollm2-135m --tag team=ci --expires 30d
  weir key list
  weir key revoke alice")]
pub(super) struct Key {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a key, and print it: it can't be shown again
    Add(Add),
    /// List keys, and what is left of their budgets
    List(List),
    /// Make a key good for nothing, at once
    Revoke(Revoke),
}

#[derive(clap::Args)]
struct Add {
    /// What it is called; policies know it as `request.key`
    name: String,
    /// What may be spent by it, of money or of tokens in an hour, a day or a month (UTC): 5usd/day, 100000tokens/hour; may be
    /// given several times
    #[arg(long, value_name = "AMOUNT/TIME", value_parser = Bound::budget)]
    budget: Vec<Bound>,
    /// How fast: 60/minute, 20000tokens/minute
    #[arg(long, value_name = "AMOUNT/minute", value_parser = Bound::rate)]
    rate: Vec<Bound>,
    /// It may only ask for this model (`provider/*`: for those of a provider); may be given several times
    #[arg(short, long, value_name = "MODEL")]
    model: Vec<String>,
    /// A tag that all its requests get: team=red, private
    #[arg(long, value_name = "NAME=VALUE", value_parser = tag)]
    tag: Vec<(String, String)>,
    /// It is good for so long: 12h, 30d
    #[arg(long, value_name = "TIME", value_parser = time)]
    expires: Option<Duration>,
    #[command(flatten)]
    place: Place,
}

#[derive(clap::Args)]
struct List {
    #[command(flatten)]
    place: Place,
}

#[derive(clap::Args)]
struct Revoke {
    /// What it is called
    name: String,
    #[command(flatten)]
    place: Place,
}

/// Where the keys are.
#[derive(clap::Args)]
pub(super) struct Place {
    /// The scheduler's state folder
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Whom to ask.
pub(super) enum Owner {
    /// The scheduler that runs.
    Running(Serving),
    /// Its state, while none runs; and the etcd that it shares.
    State(State, Option<Etcd>),
}

impl Owner {
    /// The keys of a state.
    fn keys(state: State, etcd: Option<Etcd>) -> anyhow::Result<Keys> {
        Ok(match etcd {
            Some(etcd) => Keys::open_shared(state, etcd)?,
            None => Keys::open(state)?,
        })
    }
}

impl Place {
    pub(super) fn find(&self, config: &Config) -> anyhow::Result<Owner> {
        let folder = serving::folder(config, self.state.as_deref())?;
        if Path::new(&folder).join("serving.json").is_file()
            && let Ok(serving) = Serving::find(config, self.state.as_deref())
            && serving.is_there()
        {
            return Ok(Owner::Running(serving));
        }
        let etcd = config.etcd(None, None)?.map(|etcd| Etcd::new(&etcd)).transpose()?;
        Ok(Owner::State(State::open(&folder)?, etcd))
    }
}

/// Asks a scheduler that runs.
pub(super) fn ask(
    serving: &Serving,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<Value> {
    super::runtime()?.block_on(serving.ask(method, path, body))
}

/// Seconds since 1970.
pub(super) fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}

impl Key {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        match self.command {
            Command::Add(add) => add.run(config),
            Command::List(list) => list.run(config),
            Command::Revoke(revoke) => revoke.run(config),
        }
    }
}

impl Add {
    fn run(self, config: &Config) -> anyhow::Result<()> {
        let new = NewKey {
            name: self.name,
            expires_s: self.expires.map(|time| time.as_secs()),
            limits: self.budget.into_iter().chain(self.rate).collect(),
            models: self.model,
            tags: self.tag,
        };
        let made = match self.place.find(config)? {
            Owner::Running(serving) => {
                ask(&serving, Method::POST, "keys", Some(&serde_json::to_value(new)?))?
            }
            Owner::State(state, etcd) => {
                let (key, secret) = Owner::keys(state, etcd)?.add(new, SystemTime::now())?;
                with_secret(&key, &secret)
            }
        };
        match self.place.json {
            true => writeln!(stdout(), "{}", serde_json::to_string_pretty(&made)?)?,
            false => writeln!(stdout(), "{}", made["key"].as_str().context("no key came")?)?,
        }
        eprintln!("This is all there will ever be of it: keep it as you would a password.");
        Ok(())
    }
}

impl List {
    fn run(self, config: &Config) -> anyhow::Result<()> {
        let keys = match self.place.find(config)? {
            Owner::Running(serving) => {
                let mut answer = ask(&serving, Method::GET, "keys", None)?;
                serde_json::from_value(answer["keys"].take()).context("what answers is no scheduler")?
            }
            Owner::State(state, etcd) => {
                let books = Books::open(state.clone(), now_s())?;
                list(&Owner::keys(state, etcd)?, &books.taken())
            }
        };
        if self.place.json {
            writeln!(stdout(), "{}", serde_json::to_string_pretty(&keys)?)?;
            return Ok(());
        }
        let head = ["NAME", "STATE", "LIMITS (LEFT)", "MODELS", "TAGS"].map(str::to_owned).to_vec();
        let rows: Vec<Vec<String>> = std::iter::once(head).chain(keys.iter().map(row)).collect();
        table(&mut stdout(), &rows)?;
        Ok(())
    }
}

fn row(key: &Value) -> Vec<String> {
    let texts = |value: &Value| {
        let all: Vec<&str> = value.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if all.is_empty() { "-".to_owned() } else { all.join(", ") }
    };
    let limit = |limit: &Value| {
        let (text, left) = (limit["limit"].as_str().unwrap_or_default(), limit["left"].as_u64().unwrap_or(0));
        match text {
            text if text.contains("usd/") => format!("{text} ({:.4})", left as f64 / 1e9),
            text if text.ends_with("/minute") => text.to_owned(),
            text => format!("{text} ({left})"),
        }
    };
    let limits: Vec<String> = key["limits"].as_array().into_iter().flatten().map(limit).collect();
    vec![
        key["name"].as_str().unwrap_or_default().to_owned(),
        key["state"].as_str().unwrap_or_default().to_owned(),
        if limits.is_empty() { "-".to_owned() } else { limits.join(", ") },
        texts(&key["models"]),
        texts(&key["tags"]),
    ]
}

impl Revoke {
    fn run(self, config: &Config) -> anyhow::Result<()> {
        match self.place.find(config)? {
            Owner::Running(serving) => {
                _ = ask(&serving, Method::POST, &format!("keys/{}/revoke", self.name), Some(&json!({})))?;
            }
            Owner::State(state, etcd) => Owner::keys(state, etcd)?.revoke(&self.name)?,
        }
        if self.place.json {
            writeln!(stdout(), "{}", json!({ "name": self.name, "state": "revoked" }))?;
        }
        eprintln!("{} is good for nothing any more", self.name);
        Ok(())
    }
}
