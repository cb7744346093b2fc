//! A policy file: read, checked, compiled.
use crate::budget::{Allowance, BudgetText};
use crate::compile::{Scope, condition};
use crate::eval::Expr;
use crate::place::{Problem, Problems, byte_of_value};
use serde::Deserialize;
use std::collections::BTreeMap;
use toml::Spanned;
use weir_scheduler::OnLoss;

/// Bytes of a policy file, at most; rules of it, all together; names that it lists; mistakes that are told.
const FILE_MAX: usize = 256 << 10;
const RULES_MAX: usize = 256;
const NAMES_MAX: usize = 4096;
const PROBLEMS_MAX: usize = 20;
/// A weight, at most: whatever else decides, decides by more.
const WEIGHT_MAX: f64 = 1e4;

/// A policy file, compiled. It is a [`weir_scheduler::Policy`].
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// What it is for, for a person.
    pub about: String,
    /// What keys and tags may spend; held to by whoever keeps the accounts.
    pub allowances: Vec<Allowance>,
    /// Models by class.
    pub classes: BTreeMap<String, Vec<String>>,
    /// What may stand in for a model that can't be had, in order.
    pub fallback: BTreeMap<String, Vec<String>>,
    pub(crate) filters: Vec<Filter>,
    pub(crate) wishes: Vec<Wish>,
    pub(crate) overrides: Vec<Override>,
    pub(crate) objective: Objective,
    pub(crate) spill: Spill,
    pub(crate) on_loss: OnLoss,
    pub(crate) utc_offset_s: Option<i32>,
    /// What expressions take from here is evaluated once a decision.
    pub(crate) slots: Vec<Expr>,
    pub(crate) looks_at_pool: bool,
    pub(crate) may_change: bool,
    warnings: Vec<Problem>,
}

/// A rule that keeps requests from nodes.
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    pub name: String,
    pub why: String,
    pub when: Option<Expr>,
    pub that: Expr,
    /// What `that` must be for a node to be let through.
    pub wanted: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub name: String,
    pub when: Option<Expr>,
    pub that: Expr,
    pub weight: f64,
}

#[derive(Clone, Debug)]
pub(crate) struct Override {
    pub name: String,
    pub when: Expr,
    pub set: Set,
}

#[derive(Clone, Debug)]
pub(crate) struct Spill {
    pub when: Expr,
    pub why: String,
}

impl Default for Spill {
    fn default() -> Self {
        Spill { when: Expr::Bool(false), why: "this policy lets no request leave for a provider".into() }
    }
}

/// What is to be small or large: points are `latency` for each second until the last token, `cost` for each US cent, less
/// `quality` for each unit of a node's quality; the least points win.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Objective {
    /// Points for a second.
    pub latency: f64,
    /// Points for a cent.
    pub cost: f64,
    /// Points off for quality, which is 1 for most nodes.
    pub quality: f64,
}

impl Default for Objective {
    fn default() -> Self {
        Objective { latency: 1.0, cost: 0.0, quality: 0.0 }
    }
}

type Lists = BTreeMap<String, Vec<String>>;

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct File {
    about: String,
    timezone: Option<Spanned<String>>,
    objective: Option<Spanned<Objective>>,
    on_loss: Option<OnLossText>,
    spill: Option<SpillText>,
    require: Vec<Spanned<RuleText>>,
    deny: Vec<Spanned<RuleText>>,
    prefer: Vec<Spanned<WishText>>,
    #[serde(rename = "override")]
    overrides: Vec<Spanned<OverrideText>>,
    classes: Option<Spanned<Lists>>,
    fallback: Option<Spanned<Lists>>,
    budget: Vec<Spanned<BudgetText>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum OnLossText {
    Resume,
    Restart,
    Fail,
}

impl From<OnLossText> for OnLoss {
    fn from(text: OnLossText) -> OnLoss {
        match text {
            OnLossText::Resume => OnLoss::Resume,
            OnLossText::Restart => OnLoss::Restart,
            OnLossText::Fail => OnLoss::Fail,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SpillText {
    when: Spanned<String>,
    why: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleText {
    name: Option<String>,
    why: Option<String>,
    when: Option<Spanned<String>>,
    that: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WishText {
    name: Option<String>,
    when: Option<Spanned<String>>,
    that: Spanned<String>,
    weight: Spanned<f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OverrideText {
    name: Option<String>,
    when: Spanned<String>,
    set: SetText,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct SetText {
    latency: Option<Spanned<f64>>,
    cost: Option<Spanned<f64>>,
    quality: Option<Spanned<f64>>,
    spill: Option<bool>,
    on_loss: Option<OnLossText>,
}

/// What an override sets.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Set {
    pub latency: Option<f64>,
    pub cost: Option<f64>,
    pub quality: Option<f64>,
    pub spill: Option<bool>,
    pub on_loss: Option<OnLoss>,
}

impl Rules {
    /// Reads, checks and compiles a file's text. All mistakes that can be found are told at once.
    pub fn parse(text: &str) -> Result<Rules, Problems> {
        if text.len() > FILE_MAX {
            let message = format!("the file has {} bytes; at most {FILE_MAX}", text.len());
            return Err(Problems(vec![Problem { line: 1, column: 1, message }]));
        }
        let file: File = toml::from_str(text).map_err(|e| Problems(vec![Problem::of_toml(text, &e)]))?;
        let mut reading = Reading { text, problems: Vec::new(), warnings: Vec::new() };
        let rules = reading.rules(file);
        match reading.problems.is_empty() {
            true => Ok(Rules { warnings: reading.warnings, ..rules }),
            false => {
                reading.problems.sort_by_key(|problem| (problem.line, problem.column));
                reading.problems.truncate(PROBLEMS_MAX);
                Err(Problems(reading.problems))
            }
        }
    }

    /// What isn't wrong, but may not be what was meant.
    pub fn warnings(&self) -> &[Problem] {
        &self.warnings
    }

    /// How many rules there are, of all kinds.
    pub fn len(&self) -> usize {
        self.filters.len() + self.wishes.len() + self.overrides.len()
    }

    /// There is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The class of a model: as it is listed, else by its size.
    pub(crate) fn class(&self, model: &str, bytes: u64) -> &str {
        let listed = self.classes.iter().find(|(_, models)| models.iter().any(|listed| listed == model));
        match (listed, bytes) {
            (Some((class, _)), _) => class,
            (None, 0) => "",
            (None, ..2_000_000_000) => "small",
            (None, ..16_000_000_000) => "medium",
            (None, _) => "large",
        }
    }

    /// Takes out of all expressions what is the same for all nodes.
    fn hoist(&mut self) {
        let all = self.filters.iter().flat_map(|f| f.when.iter().chain([&f.that]));
        let all = all.chain(self.wishes.iter().flat_map(|w| w.when.iter().chain([&w.that])));
        let all = all.chain(self.overrides.iter().map(|o| &o.when)).chain([&self.spill.when]);
        let (mut looks_at_pool, mut may_change) = (false, false);
        for expr in all {
            looks_at_pool |= expr.asks(&|of, name| {
                matches!(of, "pool" | "time")
                    || (of == "request" && matches!(name, "model" | "model_bytes" | "size"))
            });
            may_change |= expr.asks(&|of, name| matches!(of, "pool" | "time") || name == "waited_ms");
        }
        (self.looks_at_pool, self.may_change) = (looks_at_pool, may_change);
        let filters = self.filters.iter_mut().map(|f| &mut f.that);
        for expr in filters.chain(self.wishes.iter_mut().map(|w| &mut w.that)) {
            expr.hoist(&mut self.slots);
        }
    }
}

/// A file that is being read.
pub(crate) struct Reading<'t> {
    text: &'t str,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
}

impl Reading<'_> {
    /// Notes a mistake.
    pub fn wrong<T>(&mut self, at: usize, message: &str) -> Option<T> {
        self.problems.push(Problem::at(self.text, at, message));
        None
    }

    fn rules(&mut self, file: File) -> Rules {
        let count = file.require.len() + file.deny.len() + file.prefer.len() + file.overrides.len();
        if count > RULES_MAX {
            self.wrong::<()>(0, &format!("there are {count} rules; at most {RULES_MAX}"));
            return Rules::default();
        }
        let mut filters = Vec::new();
        for (at, rule) in file.deny.iter().enumerate() {
            filters.extend(self.filter(rule, false, at));
        }
        for (at, rule) in file.require.iter().enumerate() {
            filters.extend(self.filter(rule, true, at));
        }
        let mut rules = Rules {
            about: file.about,
            filters,
            wishes: file.prefer.iter().enumerate().filter_map(|(at, wish)| self.wish(wish, at)).collect(),
            overrides: file
                .overrides
                .iter()
                .enumerate()
                .filter_map(|(at, o)| self.overriding(o, at))
                .collect(),
            objective: file.objective.map(|objective| self.objective(&objective)).unwrap_or_default(),
            spill: file.spill.and_then(|spill| self.spill(&spill)).unwrap_or_default(),
            on_loss: file.on_loss.map(OnLoss::from).unwrap_or_default(),
            utc_offset_s: file.timezone.and_then(|zone| self.zone(&zone)),
            allowances: file.budget.iter().take(NAMES_MAX).filter_map(|b| self.allowance(b)).collect(),
            ..Rules::default()
        };
        if file.budget.len() > NAMES_MAX {
            self.wrong::<()>(0, &format!("there are {} budgets; at most {NAMES_MAX}", file.budget.len()));
        }
        rules.classes = self.names("classes", file.classes);
        rules.fallback = self.names("fallback", file.fallback);
        rules.hoist();
        rules
    }

    fn expression(&mut self, text: &Spanned<String>, scope: Scope) -> Option<Expr> {
        match condition(text.get_ref(), scope) {
            Ok(expr) => Some(expr),
            Err(wrong) => {
                let at = byte_of_value(self.text, &text.span(), wrong.at);
                self.wrong(at, &wrong.message)
            }
        }
    }

    /// An absent `when` is none; a wrong one is a mistake.
    fn when(&mut self, text: &Option<Spanned<String>>) -> Option<Option<Expr>> {
        match text {
            None => Some(None),
            Some(text) => self.expression(text, Scope::Whole).map(Some),
        }
    }

    fn filter(&mut self, rule: &Spanned<RuleText>, wanted: bool, at: usize) -> Option<Filter> {
        let RuleText { name, why, when, that } = rule.get_ref();
        let kind = if wanted { "require" } else { "deny" };
        let (when_expr, that_expr) = (self.when(when), self.expression(that, Scope::Node));
        let (when_expr, that_expr) = (when_expr?, that_expr?);
        self.warn_of_absence(that, &that_expr, when.as_ref());
        let said = that.get_ref().split_whitespace().collect::<Vec<_>>().join(" ");
        let usual = || if wanted { format!("it requires {said}") } else { format!("it denies {said}") };
        Some(Filter {
            name: named(name, kind, at),
            why: why.clone().unwrap_or_else(usual),
            when: when_expr,
            that: that_expr,
            wanted,
        })
    }

    /// A field that may be absent refuses the node then.
    fn warn_of_absence(&mut self, that: &Spanned<String>, expr: &Expr, when: Option<&Spanned<String>>) {
        for name in ["max_usd", "ttft_ms", "deadline_ms"] {
            let asked = expr.asks(&|of, field| of == "request" && field == name);
            let guard = format!("has(request.{name})");
            let has = |text: &str| text.split_whitespace().collect::<String>().contains(&guard);
            if asked && !has(that.get_ref()) && !when.is_some_and(|when| has(when.get_ref())) {
                let message = format!(
                    "request.{name} may be absent, and the rule then keeps the request from every node; \
                     add `when = \"{guard}\"`"
                );
                self.warnings.push(Problem::at(self.text, that.span().start, message));
            }
        }
    }

    fn wish(&mut self, wish: &Spanned<WishText>, at: usize) -> Option<Wish> {
        let WishText { name, when, that, weight } = wish.get_ref();
        let (when, that) = (self.when(when), self.expression(that, Scope::Node));
        let weight = self.weight("weight", weight, -WEIGHT_MAX);
        Some(Wish { name: named(name, "prefer", at), when: when?, that: that?, weight: weight? })
    }

    fn weight(&mut self, name: &str, weight: &Spanned<f64>, least: f64) -> Option<f64> {
        let value = *weight.get_ref();
        match (least..=WEIGHT_MAX).contains(&value) {
            true => Some(value),
            false => {
                let message = format!("{name} is {value}; it must be in {least} to {WEIGHT_MAX}");
                self.wrong(weight.span().start, &message)
            }
        }
    }

    fn objective(&mut self, objective: &Spanned<Objective>) -> Objective {
        let Objective { latency, cost, quality } = *objective.get_ref();
        for (name, value) in [("latency", latency), ("cost", cost), ("quality", quality)] {
            if !(0.0..=WEIGHT_MAX).contains(&value) {
                let message = format!("{name} is {value}; it must be in 0 to {WEIGHT_MAX}");
                self.wrong::<()>(objective.span().start, &message);
            }
        }
        *objective.get_ref()
    }

    fn overriding(&mut self, text: &Spanned<OverrideText>, at: usize) -> Option<Override> {
        let OverrideText { name, when, set } = text.get_ref();
        let when = self.expression(when, Scope::Whole);
        let mut weight = |name: &str, weight: &Option<Spanned<f64>>| match weight {
            Some(weight) => self.weight(name, weight, 0.0),
            None => None,
        };
        let set = Set {
            latency: weight("latency", &set.latency),
            cost: weight("cost", &set.cost),
            quality: weight("quality", &set.quality),
            spill: set.spill,
            on_loss: set.on_loss.map(OnLoss::from),
        };
        Some(Override { name: named(name, "override", at), when: when?, set })
    }

    fn spill(&mut self, spill: &SpillText) -> Option<Spill> {
        let when = self.expression(&spill.when, Scope::Whole)?;
        let said = spill.when.get_ref().split_whitespace().collect::<Vec<_>>().join(" ");
        let usual = || format!("requests leave for a provider only when {said}");
        Some(Spill { when, why: spill.why.clone().unwrap_or_else(usual) })
    }

    /// `Z`, `+01:00`, `-0330`: seconds east of Greenwich.
    fn zone(&mut self, zone: &Spanned<String>) -> Option<i32> {
        let text = zone.get_ref();
        let parsed = || {
            let (sign, rest) = match text.strip_prefix('+') {
                Some(rest) => (1, rest),
                None => (-1, text.strip_prefix('-')?),
            };
            let digits: String = rest.chars().filter(|c| *c != ':').collect();
            let number: i32 =
                digits.parse().ok().filter(|_| digits.len() == 4 && !digits.starts_with('+'))?;
            let (hours, minutes) = (number / 100, number % 100);
            (hours <= 14 && minutes < 60).then_some(sign * (hours * 3600 + minutes * 60))
        };
        match if text == "Z" || text == "UTC" { Some(0) } else { parsed() } {
            Some(offset) => Some(offset),
            None => {
                self.wrong(zone.span().start, "a time zone is \"UTC\", or hours and minutes as in \"+01:00\"")
            }
        }
    }

    fn names(&mut self, what: &str, lists: Option<Spanned<Lists>>) -> Lists {
        let Some(lists) = lists else { return Lists::new() };
        let (at, lists) = (lists.span().start, lists.into_inner());
        let count: usize = lists.values().map(Vec::len).sum::<usize>() + lists.len();
        if count > NAMES_MAX {
            self.wrong::<()>(at, &format!("[{what}] has {count} names; at most {NAMES_MAX}"));
        }
        for (name, list) in &lists {
            if what == "fallback" && list.contains(name) {
                self.wrong::<()>(at, &format!("[{what}] `{name}` stands in for itself"));
            }
        }
        lists
    }
}

fn named(name: &Option<String>, kind: &str, at: usize) -> String {
    name.clone().unwrap_or_else(|| format!("{kind} {}", at + 1))
}
