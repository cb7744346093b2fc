//! `weir policy`
use super::output::table;
use super::serving::Serving;
use crate::config::Config;
use crate::policy::{Source, read};
use anyhow::{Context, anyhow, bail};
use clap::Subcommand;
use hyper::Method;
use serde_json::{Value, json};
use std::io::{Write, stdin, stdout};
use std::path::{Path, PathBuf};
use weir_policies::{
    Explanation, Outcome, PoolFile, Problem, RequestFile, Rules, SHIPPED, Table, Verdict, explain, schema,
    vocabulary,
};

/// Check, explain and test routing policies
#[derive(clap::Args)]
#[command(after_help = "\
A policy is a file, or one that comes with weir: local-only, private-stays-home, cheapest, fastest, spill-when-busy,
office-hours.

Examples:
  weir serve --policy spill-when-busy
  weir policy check house.toml
  weir policy explain house.toml --request r.json              against the scheduler that runs here
  weir policy explain house.toml --request r.json --pool p.toml
  weir policy test house.test.toml
  weir policy show office-hours > house.toml                   a beginning for one's own")]
pub(super) struct Policy {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say what is wrong with a policy, and where
    Check {
        /// A file, or the name of a policy that comes with weir
        policy: String,
        /// Print what is found as JSON
        #[arg(long)]
        json: bool,
    },
    /// Say, node by node, why a request would go where it goes
    Explain(Explain),
    /// Check a table of requests and of where they are expected to go
    Test {
        /// The table; its policy is named from its folder
        table: PathBuf,
        /// Print what goes otherwise as JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the JSON schema of policy files, for editors
    Schema,
    /// Print a policy that comes with weir; without a name: all names, and what expressions can ask
    Show {
        /// Its name
        name: Option<String>,
    },
}

#[derive(clap::Args)]
struct Explain {
    /// A file, or the name of a policy that comes with weir
    policy: String,
    /// The request, as clients send it or in a policy's own terms; `-` reads it from standard input
    #[arg(long, value_name = "FILE")]
    request: PathBuf,
    /// A pool that is written down (TOML, or what `weir nodes --json` prints) instead of a running one
    #[arg(long, value_name = "FILE")]
    pool: Option<PathBuf>,
    /// The scheduler's state folder
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Policy {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        match self.command {
            Command::Check { policy, json } => check(&policy, json),
            Command::Explain(explain) => explain.run(config),
            Command::Test { table, json } => test(&table, json),
            Command::Schema => Ok(writeln!(stdout(), "{}", serde_json::to_string_pretty(&schema())?)?),
            Command::Show { name } => show(name.as_deref()),
        }
    }
}

fn check(name: &str, as_json: bool) -> anyhow::Result<()> {
    let source = Source::named(name)?;
    let text = source.text()?;
    let (errors, warnings) = match Rules::parse(&text) {
        Ok(rules) => (Vec::new(), rules.warnings().to_vec()),
        Err(problems) => (problems.0, Vec::new()),
    };
    if as_json {
        writeln!(stdout(), "{}", json!({ "errors": errors, "warnings": warnings }))?;
    } else {
        let said = |kind: &str, all: &[Problem]| {
            for Problem { line, column, message } in all {
                eprintln!("{}:{line}:{column}: {kind}{message}", source.name());
            }
        };
        said("", &errors);
        said("warning: ", &warnings);
    }
    match errors.len() {
        0 => Ok(()),
        1 => bail!("{} has a mistake", source.name()),
        n => bail!("{} has {n} mistakes", source.name()),
    }
}

fn show(name: Option<&str>) -> anyhow::Result<()> {
    let Some(name) = name else {
        let heads = SHIPPED.iter().map(|policy| {
            let about = Rules::parse(policy.text).map(|rules| rules.about).unwrap_or_default();
            vec![policy.name.to_owned(), about]
        });
        table(&mut stdout(), &heads.collect::<Vec<_>>())?;
        writeln!(stdout())?;
        let fields =
            vocabulary().into_iter().map(|(name, kind, about)| vec![name, kind.into(), about.into()]);
        return Ok(table(&mut stdout(), &fields.collect::<Vec<_>>())?);
    };
    match weir_policies::shipped(name) {
        Some(policy) => Ok(write!(stdout(), "{}", policy.text)?),
        None => bail!("no policy `{name}` comes with weir; `weir policy show` lists those that do"),
    }
}

impl Explain {
    fn run(&self, config: &Config) -> anyhow::Result<()> {
        let rules = Source::named(&self.policy)?.load()?;
        let request = self.request()?;
        let pool = match &self.pool {
            Some(path) => pool(path)?,
            None => {
                let serving = Serving::find(config, self.state.as_deref())?;
                let survey = super::runtime()?.block_on(serving.ask(Method::GET, "nodes", None))?;
                PoolFile::from_survey(&survey)
            }
        };
        let explanation = explain(&rules, &pool, &request).map_err(|why| anyhow!(why))?;
        match self.json {
            true => writeln!(stdout(), "{}", serde_json::to_string_pretty(&explanation)?)?,
            false => told(&explanation)?,
        }
        Ok(())
    }

    fn request(&self) -> anyhow::Result<RequestFile> {
        let named = || self.request.display().to_string();
        let text = match self.request.as_os_str() == "-" {
            true => std::io::read_to_string(stdin())?,
            false => read(&self.request)?,
        };
        let value: Value = serde_json::from_str(&text).with_context(named)?;
        RequestFile::from_json(&value).map_err(|why| anyhow!("{}: {why}", named()))
    }
}

/// A pool that is written down, in either way.
fn pool(path: &Path) -> anyhow::Result<PoolFile> {
    let text = read(path)?;
    if text.trim_start().starts_with(['[', '{'])
        && let Ok(survey) = serde_json::from_str::<Value>(&text)
    {
        return Ok(PoolFile::from_survey(&survey));
    }
    PoolFile::parse(&text).map_err(|problems| anyhow!("{}: {problems}", path.display()))
}

/// For a person.
fn told(explanation: &Explanation) -> anyhow::Result<()> {
    let head = ["NODE", "TRUST", "", "POINTS", "TOTAL", "COST", "WHY"].map(str::to_owned).to_vec();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(explanation.nodes.iter().map(row)).collect();
    table(&mut stdout(), &rows)?;
    let mut out = stdout();
    if let Some(name) = &explanation.overriding {
        writeln!(out, "\nOverride in force: {name}.")?;
    }
    match &explanation.outcome {
        Outcome::Goes(node) => writeln!(out, "\nIt goes to {node}.")?,
        Outcome::Waits => writeln!(out, "\nIt waits: all that may have it are full.")?,
        Outcome::Refused(why) => writeln!(out, "\nIt is refused: {why}.")?,
    }
    Ok(())
}

fn row(node: &Verdict) -> Vec<String> {
    let number = |value: Option<f64>, digits: usize, unit: &str| {
        value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}{unit}"))
    };
    let why = match (&node.rule, &node.why) {
        (Some(rule), Some(why)) => {
            let fault = node.fault.as_ref().map(|fault| format!(" ({fault})")).unwrap_or_default();
            format!("{rule}: {why}{fault}")
        }
        _ => node.prefers.join(", "),
    };
    let state = match (node.kept, node.full) {
        (true, false) => "kept",
        (true, true) => "full",
        (false, _) => "dropped",
    };
    vec![
        node.node.clone(),
        node.trust.to_owned(),
        state.to_owned(),
        number(node.points, 2, ""),
        number(node.total_ms, 0, " ms"),
        node.usd.map_or_else(|| "-".to_owned(), |usd| format!("${usd:.6}")),
        why,
    ]
}

fn test(path: &Path, as_json: bool) -> anyhow::Result<()> {
    let text = read(path)?;
    let table = Table::parse(&text).map_err(|problems| anyhow!("{}: {problems}", path.display()))?;
    let beside = path.parent().unwrap_or(Path::new("")).join(&table.policy);
    let source = if beside.is_file() { Source::File(beside) } else { Source::named(&table.policy)? };
    let rules = source.load()?;
    let wrong = table.mismatches(&text, &rules);
    if as_json {
        let told: Vec<Value> = wrong
            .iter()
            .map(|w| json!({ "line": w.line, "case": w.case, "message": w.message, "explanation": w.explanation }))
            .collect();
        writeln!(stdout(), "{}", json!({ "cases": table.cases.len(), "mismatches": told }))?;
    } else {
        for mismatch in &wrong {
            writeln!(
                stdout(),
                "{}:{}: {}: {}",
                path.display(),
                mismatch.line,
                mismatch.case,
                mismatch.message
            )?;
            if let Some(explanation) = &mismatch.explanation {
                told(explanation)?;
                writeln!(stdout())?;
            }
        }
    }
    match wrong.len() {
        0 => {
            eprintln!("{} cases go as expected.", table.cases.len());
            Ok(())
        }
        n => bail!("{n} of {} cases go otherwise", table.cases.len()),
    }
}
