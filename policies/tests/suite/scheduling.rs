//! Policies at work in the scheduler: what waits is spilled in time, what is refused is told why, streams end or go on as the
//! policy has it, and another policy takes over while requests wait.
use std::time::Duration;
use weir_policies::{Rules, shipped};
use weir_scheduler::{
    Class, Clock, Event, Failure, Finish, FromNode, Generate, Held, Input, KvType, Limits, ModelId, NodeId,
    Output, Price, Priority, Profile, Rates, RequestId, Scheduler, Status, Time, ToNode, Token, Trust, Usage,
    Wanted,
};

const MODEL: ModelId = ModelId([9; 32]);

fn at(ms: u64) -> Time {
    Time(ms * 1_000_000)
}

fn held(model: ModelId, name: &str, numerics: &str) -> Held {
    let token_time = Duration::from_millis(10);
    Held {
        model,
        name: name.into(),
        text: None,
        context: 4096,
        numerics: numerics.into(),
        kv: KvType::F16,
        kv_blocks: 64,
        slots: 1,
        rates: Rates {
            prefill_tokens_per_s: 1000.0,
            token_time_alone: token_time,
            token_time_full: token_time,
        },
        weights: 7,
        bytes: 7,
        pinned: true,
        prefixes: Vec::new(),
        resumes: true,
        grammars: true,
    }
}

struct Bench {
    scheduler: Scheduler,
    sent: Vec<(u64, u64)>,
    failed: Vec<(u64, Failure)>,
    ids: Vec<u64>,
}

impl Bench {
    /// A scheduler with a node for each of these, numbered from 0: whose it is, and its numerics.
    fn new(policy: &str, nodes: &[(Trust, &str)]) -> Bench {
        let rules = Rules::parse(policy).unwrap_or_else(|why| panic!("{why}\n{policy}"));
        let scheduler = Scheduler::new(Limits::default(), Box::new(rules), 1);
        let mut bench = Bench { scheduler, sent: Vec::new(), failed: Vec::new(), ids: Vec::new() };
        for (n, (trust, numerics)) in nodes.iter().enumerate() {
            let price = Price { prompt: 0, output: if *trust == Trust::Provider { 1000 } else { 0 } };
            let models = vec![held(MODEL, "m", numerics)];
            let name = format!("n{n}");
            let profile =
                Profile { name, identity: n as u64 + 1, trust: *trust, price, models, ..Profile::default() };
            bench.tell(0, Input::Connected { node: NodeId(n as u64), profile });
            bench.ids.push(n as u64);
        }
        bench
    }

    fn tell(&mut self, ms: u64, input: Input) {
        self.scheduler.handle(at(ms), input);
        self.listen();
    }

    fn listen(&mut self) {
        while let Some(output) = self.scheduler.poll() {
            match output {
                Output::Send { node, message: ToNode::Generate(ask) } => {
                    self.sent.push((node.0, ask.request.0))
                }
                Output::Emit { request, event: Event::Failed(failure) } => {
                    self.failed.push((request.0, failure))
                }
                _ => {}
            }
        }
    }

    fn ask(&mut self, ms: u64, id: u64, change: impl Fn(&mut Generate)) {
        let mut ask = Generate { request: RequestId(id), ..Generate::new(MODEL, vec![1; 10], 100) };
        change(&mut ask);
        self.tell(ms, Input::Submit(Box::new(ask)));
    }

    fn token(&mut self, ms: u64, node: u64, request: u64) {
        let token = Token { position: 0, id: 7, text: String::new(), logprob: None };
        let from = FromNode::Event { request: RequestId(request), attempt: 0, event: Event::Token(token) };
        self.tell(ms, Input::Node { node: NodeId(node), from });
    }

    /// Time passes, and nodes are alive.
    fn pass(&mut self, from_ms: u64, to_ms: u64) {
        let mut ms = from_ms;
        while ms < to_ms {
            ms += 50;
            for node in self.ids.clone() {
                self.tell(ms, Input::Node { node: NodeId(node), from: FromNode::Status(Status::default()) });
            }
            if self.scheduler.wake_at().is_some_and(|wake| wake <= at(ms)) {
                self.tell(ms, Input::Tick);
            }
        }
    }
}

fn text(name: &str) -> &'static str {
    shipped(name).expect("it comes along").text
}

#[test]
fn what_waits_is_spilled_in_time() {
    let mut bench = Bench::new(text("spill-when-busy"), &[(Trust::Own, "x"), (Trust::Provider, "y")]);
    bench.ask(0, 1, |_| {});
    bench.ask(10, 2, |_| {});
    bench.ask(20, 3, |ask| ask.priority = Priority::Background);
    assert_eq!(bench.sent, [(0, 1)], "the others wait");
    bench.pass(50, 1900);
    assert_eq!(bench.sent.len(), 1);
    bench.pass(1900, 2400);
    assert_eq!(bench.sent, [(0, 1), (1, 2)], "after two seconds, but no background work");
    let usage = Usage::default();
    let event = Event::Finished { reason: Finish::Stop, text: String::new(), usage };
    let from = FromNode::Event { request: RequestId(1), attempt: 0, event };
    bench.tell(2500, Input::Node { node: NodeId(0), from });
    assert_eq!(bench.sent.last(), Some(&(0, 3)));
}

#[test]
fn who_is_refused_is_told_by_which_rule() {
    let nodes = [(Trust::Guest, "x"), (Trust::Guest, "x"), (Trust::Provider, "x")];
    let mut bench = Bench::new(text("local-only"), &nodes);
    bench.ask(0, 1, |_| {});
    let message = &bench.failed[0].1.message;
    assert!(
        message.contains("rule `local only`: requests run on machines of our own (2 nodes)"),
        "{message}"
    );
    assert!(message.contains("rule `spill`: "), "{message}");
    let mut bench = Bench::new(text("fastest"), &[(Trust::Provider, "x")]);
    bench.ask(0, 1, |ask| ask.max_cost = Some(99_999));
    assert!(bench.failed[0].1.message.contains("$0.000100 there"), "{:?}", bench.failed);
    bench.ask(0, 2, |ask| ask.max_cost = Some(100_000));
    assert_eq!(bench.sent, [(0, 2)]);
}

#[test]
fn a_stream_that_loses_its_node_ends_or_goes_on_as_the_policy_has_it() {
    let check = |on_loss: &str, other: &str, expected: bool| {
        let policy = format!("on_loss = '{on_loss}'");
        let mut bench = Bench::new(&policy, &[(Trust::Own, "x"), (Trust::Own, other)]);
        bench.tell(0, Input::Drain { node: NodeId(1), on: true });
        bench.ask(0, 1, |_| {});
        bench.token(20, 0, 1);
        bench.tell(30, Input::Drain { node: NodeId(1), on: false });
        bench.tell(40, Input::Lost { node: NodeId(0), reason: "gone".into() });
        let goes_on = bench.sent == [(0, 1), (1, 1)];
        assert_eq!(
            (goes_on, bench.failed.is_empty()),
            (expected, expected),
            "{on_loss} {other}: {:?}",
            bench.failed
        );
    };
    check("resume", "x", true);
    check("resume", "y", true);
    check("restart", "x", true);
    check("restart", "y", false);
    check("fail", "x", false);
}

#[test]
fn another_policy_takes_over_while_requests_wait() {
    let mut bench = Bench::new(text("spill-when-busy"), &[(Trust::Own, "x"), (Trust::Provider, "x")]);
    bench.ask(0, 1, |_| {});
    bench.ask(0, 2, |_| {});
    assert_eq!(bench.sent, [(0, 1)]);
    bench.scheduler.set_policy(at(10), Box::new(Rules::parse(text("fastest")).unwrap()));
    bench.listen();
    assert_eq!(bench.sent, [(0, 1), (1, 2)]);
}

#[test]
fn office_hours_follow_the_clock() {
    // The fifth of January 1970 was a Monday.
    let check = |hour: i64, expected: usize| {
        let mut bench = Bench::new(text("office-hours"), &[(Trust::Own, "x"), (Trust::Provider, "x")]);
        let clock = Clock { unix_s: 4 * 86_400 + hour * 3600 - 3600, utc_offset_s: 3600 };
        bench.scheduler.set_clock(at(0), clock);
        for id in 1..3 {
            bench.ask(1000, id, |ask| ask.priority = Priority::Interactive);
        }
        assert_eq!(bench.sent.len(), expected, "at {hour}");
    };
    check(7, 1);
    check(8, 2);
    check(17, 2);
    check(18, 1);
}

#[test]
fn classes_are_as_they_are_listed() {
    let policy = "[classes]\nsmall = ['other', 'm']";
    let mut bench = Bench::new(policy, &[(Trust::Own, "x")]);
    let smaller = Held { weights: 1, ..held(ModelId([1; 32]), "tiny", "x") };
    let profile = Profile { name: "n9".into(), identity: 9, models: vec![smaller], ..Profile::default() };
    bench.tell(0, Input::Connected { node: NodeId(9), profile });
    for (want, class) in [(1, Class::Small), (2, Class::Large)] {
        bench.scheduler.handle(at(0), Input::Want { want, model: Wanted::Class(class) });
        let found = std::iter::from_fn(|| bench.scheduler.poll()).find_map(|output| match output {
            Output::Found { found, .. } => Some(found),
            _ => None,
        });
        assert_eq!(found, Some(Ok(MODEL)), "{class:?}");
    }
}
