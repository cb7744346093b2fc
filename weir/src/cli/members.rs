//! `weir link`, `weir nodes`, `weir revoke`, `weir drain`: the owner's commands to a running scheduler.
use super::output::{note, table};
use super::serving::Serving;
use crate::config::Config;
use hyper::Method;
use serde_json::{Value, json};
use std::io::{Write, stdout};
use std::path::PathBuf;
use std::time::Duration;

/// Print a link with which another machine can join
#[derive(clap::Args)]
#[command(after_help = "\
Nothing but the link goes to standard output. Whoever has it can join as long as it is valid: hand it over as you would
a password.

Examples:
  weir link
  weir link --uses 10 --expires 24h
  ssh desktop weir join \"$(weir link)\"")]
pub(super) struct Link {
    /// The scheduler's state folder
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Machines that may join with it
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    uses: u32,
    /// For how long: 90s, 15m, 1h, 7d
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = time)]
    expires: Duration,
    /// They become guests, which see no request that is tagged private
    #[arg(long)]
    guest: bool,
}

/// List the nodes of a running scheduler
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  weir nodes\n  weir nodes --json | jq -r '.[].name'")]
pub(super) struct Nodes {
    /// The scheduler's state folder
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Let a machine in that asks to join
#[derive(clap::Args)]
#[command(after_help = "\
A machine on which `weir join --lan` was typed shows a code. Give that code here, as it is on that machine's screen: it is
only known here if nobody is in between.

Examples:
  weir admit K7QF-3MXA")]
pub(super) struct Admit {
    /// The code on the other machine's screen
    code: String,
    /// The scheduler's state folder
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

/// Cut a node off for good
#[derive(clap::Args)]
#[command(after_help = "\
Its link is cut at once, and what runs there goes on elsewhere. It can only come back with a new key and a new link.

Examples:
  weir revoke desktop
  weir revoke 3fa9c01b22")]
pub(super) struct Revoke {
    /// Its name, or its id or the beginning of it
    node: String,
    /// The scheduler's state folder
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

/// Send a node nothing new, and move what runs there
#[derive(clap::Args)]
#[command(after_help = "\
What has nowhere else to go is finished there. This outlives restarts of either side, until --off.

Examples:
  weir drain desktop
  weir drain desktop --off")]
pub(super) struct Drain {
    /// Its name, or its id or the beginning of it
    node: String,
    /// Use it again
    #[arg(long)]
    off: bool,
    /// The scheduler's state folder
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

/// `90s`, `15m`, `1h`, `7d`.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time; write it as 90s, 15m, 1h or 7d");
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let number: u32 = number.parse().map_err(|_| wrong())?;
    Ok(Duration::from_secs(u64::from(number) * seconds))
}

fn ask(serving: &Serving, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<Value> {
    super::runtime()?.block_on(serving.ask(method, path, body.as_ref()))
}

impl Link {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let serving = Serving::find(config, self.state.as_deref())?;
        let wanted = json!({ "uses": self.uses, "expires_s": self.expires.as_secs(), "guest": self.guest });
        let made = ask(&serving, Method::POST, "links", Some(wanted))?;
        writeln!(stdout(), "{}", made["link"].as_str().unwrap_or_default())?;
        Ok(())
    }
}

impl Nodes {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let serving = Serving::find(config, self.state.as_deref())?;
        let answer = ask(&serving, Method::GET, "nodes", None)?;
        let nodes = answer["nodes"].as_array().cloned().unwrap_or_default();
        if self.json {
            writeln!(stdout(), "{}", serde_json::to_string_pretty(&nodes)?)?;
            return Ok(());
        }
        if let Some(schedulers) = answer["schedulers"].as_array() {
            let told = |one: &Value| {
                let own = if one["own"] == true { " (this one)" } else { "" };
                format!("{}{own}", one["addresses"][0].as_str().unwrap_or("?"))
            };
            let all: Vec<String> = schedulers.iter().map(told).collect();
            note(&format!("Schedulers: {}", all.join(", ")));
        }
        let head = ["ID", "NAME", "STATE", "RUNNING", "TOKENS", "MODELS"].map(str::to_owned).to_vec();
        let rows: Vec<Vec<String>> = std::iter::once(head).chain(nodes.iter().map(row)).collect();
        table(&mut stdout(), &rows)?;
        Ok(())
    }
}

fn row(node: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let models = node["models"].as_array().map(Vec::as_slice).unwrap_or_default();
    let sum = |field: &str| models.iter().filter_map(|m| m[field].as_u64()).sum::<u64>().to_string();
    let names: Vec<&str> = models.iter().filter_map(|m| m["name"].as_str()).collect();
    let guest = if node["guest"] == true { " (guest)" } else { "" };
    vec![
        text(&node["id"]),
        text(&node["name"]),
        match node["code"].as_str() {
            Some(code) => format!("asks ({code})"),
            None => format!("{}{guest}", text(&node["state"])),
        },
        format!("{}/{}", sum("running"), sum("slots")),
        sum("tokens"),
        names.join(", "),
    ]
}

impl Admit {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let code: String = self.code.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
        let serving = Serving::find(config, self.state.as_deref())?;
        ask(&serving, Method::POST, &format!("nodes/{code}/admit"), None)?;
        eprintln!("It is let in, and comes by itself within seconds");
        Ok(())
    }
}

impl Revoke {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let serving = Serving::find(config, self.state.as_deref())?;
        ask(&serving, Method::POST, &format!("nodes/{}/revoke", self.node), None)?;
        eprintln!("{} is cut off and can't come back", self.node);
        Ok(())
    }
}

impl Drain {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let serving = Serving::find(config, self.state.as_deref())?;
        let wanted = json!({ "on": !self.off });
        ask(&serving, Method::POST, &format!("nodes/{}/drain", self.node), Some(wanted))?;
        match self.off {
            false => {
                eprintln!("{} gets nothing new; `weir drain {} --off` takes that back", self.node, self.node)
            }
            true => eprintln!("{} is used again", self.node),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let seconds = |text: &str| time(text).map(|d| d.as_secs()).ok();
        assert_eq!(
            (seconds("90s"), seconds("15m"), seconds("1h"), seconds("7d")),
            (Some(90), Some(900), Some(3600), Some(604_800))
        );
        for bad in ["", "s", "1", "1w", "-1h", "1é", "99999999999s"] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }
}
