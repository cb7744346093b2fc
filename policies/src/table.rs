//! Tables of requests and of where they are expected to go, for people's own CI.
use crate::explain::{Explanation, Outcome, explain};
use crate::file::Rules;
use crate::place::{Problem, Problems};
use crate::pool::{NodeFile, PoolFile, RequestFile};
use serde::Deserialize;
use std::collections::BTreeMap;
use toml::Spanned;

/// Bytes of a table, at most.
const FILE_MAX: usize = 1 << 20;

/// A table: a policy, a pool, and cases.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// The policy: the name of a shipped one, or a path from the table's folder.
    pub policy: String,
    /// The nodes of all cases.
    #[serde(rename = "node", default)]
    pub nodes: Vec<NodeFile>,
    /// What is asked, and what is expected.
    #[serde(rename = "case", default)]
    pub cases: Vec<Spanned<Case>>,
}

/// A request, and what is expected to become of it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Case {
    /// What it shows.
    pub name: String,
    /// What is asked.
    pub request: RequestFile,
    /// Requests that run, by node: as many of each of its models.
    pub running: BTreeMap<String, u32>,
    /// Nodes that aren't there.
    pub without: Vec<String>,
    /// Other requests that wait.
    pub queue: usize,
    /// What time it is: `Mon 10:30`.
    pub time: Option<String>,
    /// The node that it goes to, or `waits`, or `refused`.
    pub expect: String,
    /// A rule that keeps it from at least one node.
    pub rule: Option<String>,
    /// Nodes that it may not go to.
    pub never: Vec<String>,
}

/// A case that went otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    /// Its line in the table.
    pub line: usize,
    /// Its name.
    pub case: String,
    /// What was expected, and what came.
    pub message: String,
    /// Why.
    pub explanation: Option<Explanation>,
}

impl Table {
    /// Reads a table.
    pub fn parse(text: &str) -> Result<Table, Problems> {
        if text.len() > FILE_MAX {
            let message = format!("the table has {} bytes; at most {FILE_MAX}", text.len());
            return Err(Problems(vec![Problem { line: 1, column: 1, message }]));
        }
        let table: Table = toml::from_str(text).map_err(|e| Problems(vec![Problem::of_toml(text, &e)]))?;
        let known = |name: &String| table.nodes.iter().any(|node| node.name == *name);
        let mut problems = Vec::new();
        for case in &table.cases {
            let (at, case) = (case.span().start, case.get_ref());
            let expected = Some(&case.expect).filter(|e| !matches!(e.as_str(), "waits" | "refused"));
            let named = case.running.keys().chain(&case.without).chain(&case.never).chain(expected);
            for name in named.filter(|name| !known(name)) {
                let message = format!("case `{}`: there is no node `{name}`", case.name);
                problems.push(Problem::at(text, at, message));
            }
        }
        if problems.is_empty() { Ok(table) } else { Err(Problems(problems)) }
    }

    /// The cases that go otherwise than expected.
    pub fn mismatches(&self, text: &str, rules: &Rules) -> Vec<Mismatch> {
        let lines = |at: usize| Problem::at(text, at, "").line;
        let told = self.cases.iter().filter_map(|case| {
            let (message, explanation) = self.check(case.get_ref(), rules)?;
            let (line, case) = (lines(case.span().start), case.get_ref().name.clone());
            Some(Mismatch { line, case, message, explanation })
        });
        told.collect()
    }

    /// The pool of a case.
    pub fn pool(&self, case: &Case) -> PoolFile {
        let mut nodes: Vec<NodeFile> =
            self.nodes.iter().filter(|node| !case.without.contains(&node.name)).cloned().collect();
        for node in &mut nodes {
            if let Some(running) = case.running.get(&node.name) {
                node.models.iter_mut().for_each(|model| model.running = *running);
            }
        }
        PoolFile { nodes, queue: case.queue, time: case.time.clone(), ..PoolFile::default() }
    }

    fn check(&self, case: &Case, rules: &Rules) -> Option<(String, Option<Explanation>)> {
        let explanation = match explain(rules, &self.pool(case), &case.request) {
            Ok(explanation) => explanation,
            Err(why) => return Some((why, None)),
        };
        let came = match &explanation.outcome {
            Outcome::Goes(node) => node.as_str(),
            Outcome::Waits => "waits",
            Outcome::Refused(_) => "refused",
        };
        let kept = |name: &&String| explanation.nodes.iter().any(|node| node.kept && node.node == **name);
        let message = if came != case.expect {
            format!("expected `{}`, and came to `{came}`", case.expect)
        } else if let Some(node) = case.never.iter().find(kept) {
            format!("it may go to `{node}`")
        } else if let Some(rule) = case.rule.as_ref().filter(|rule| !drops(&explanation, rule)) {
            format!("rule `{rule}` keeps it from no node")
        } else {
            return None;
        };
        Some((message, Some(explanation)))
    }
}

fn drops(explanation: &Explanation, rule: &str) -> bool {
    explanation.nodes.iter().any(|node| node.rule.as_deref() == Some(rule))
}
