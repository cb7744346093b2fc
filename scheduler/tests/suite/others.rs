//! Requests that other models will do for, and nodes that keep accounts of their own.
use crate::money::allow;
use crate::samples::{MODEL, ask, profile};
use std::time::Duration;
use weir_scheduler::{
    Account, Allowance, Ask, Decision, Denial, Event, Failure, FailureKind, Fastest, Finish, FromNode,
    Generate, Held, Holder, Input, Limit, Limits, ModelId, NodeId, Offer, Output, Period, Policy, PoolView,
    Price, Profile, RequestId, Scheduler, Time, ToNode, Token, Trust, Unit, Usage, Who,
};

const THEIRS: ModelId = ModelId([42; 32]);
/// A node of ours with one slot, and a provider.
const OURS: NodeId = NodeId(1);
const PROVIDER: NodeId = NodeId(2);

fn at(ms: u64) -> Time {
    Time::ZERO + Duration::from_millis(ms)
}

fn house(resumes: bool) -> Scheduler {
    let mut s = Scheduler::new(Limits::default(), Box::new(Fastest), 1);
    s.handle(at(0), Input::Connected { node: OURS, profile: profile("ours", 1) });
    let mut theirs = profile("theirs", 8);
    let held = theirs.models.remove(0);
    let held = Held { model: THEIRS, resumes, kv_blocks: 0, ..held };
    let price = Price { prompt: 10, output: 100 };
    let theirs = Profile { trust: Trust::Provider, models: vec![held], price, identity: 2, ..theirs };
    s.handle(at(0), Input::Connected { node: PROVIDER, profile: theirs });
    s
}

fn submit(s: &mut Scheduler, now: Time, id: u64, change: impl FnOnce(&mut Generate)) {
    let mut ask = ask(id, vec![1, 2, 3], 10);
    change(&mut ask);
    s.handle(now, Input::Submit(Box::new(ask)));
}

fn say(s: &mut Scheduler, now: Time, node: NodeId, id: u64, attempt: u32, event: Event) {
    s.handle(now, Input::Node { node, from: FromNode::Event { request: RequestId(id), attempt, event } });
}

fn token(position: u32) -> Event {
    Event::Token(Token { position, id: 7, text: String::new(), logprob: None })
}

fn outputs(s: &mut Scheduler) -> Vec<Output> {
    s.check();
    std::iter::from_fn(|| s.poll()).collect()
}

/// Who was sent what: node, request, model, tokens so far.
fn sent(s: &mut Scheduler) -> Vec<(NodeId, u64, ModelId, usize)> {
    let sent = outputs(s).into_iter().filter_map(|output| match output {
        Output::Send { node, message: ToNode::Generate(ask) } => {
            Some((node, ask.request.0, ask.model, ask.output.len()))
        }
        _ => None,
    });
    sent.collect()
}

#[test]
fn another_model_is_taken_where_there_is_no_room_for_the_first() {
    let mut s = house(true);
    let spills = |ask: &mut Generate| ask.otherwise = vec![ModelId([9; 32]), THEIRS];
    submit(&mut s, at(1), 1, spills);
    assert_eq!(sent(&mut s), [(OURS, 1, MODEL, 0)], "the first choice, as long as it can be had");
    submit(&mut s, at(2), 2, |_| {});
    assert_eq!(sent(&mut s), [], "it didn't say that another would do");
    submit(&mut s, at(3), 3, spills);
    assert_eq!(sent(&mut s), [(PROVIDER, 3, THEIRS, 0)]);
    submit(&mut s, at(4), 4, |ask| {
        spills(ask);
        ask.tags = vec![("private".into(), String::new())];
    });
    assert_eq!(sent(&mut s), [], "what is private waits");
    // And back, when the provider has had enough.
    let failure = Failure { kind: FailureKind::Busy, message: "429".into() };
    s.handle(at(5), Input::Node { node: PROVIDER, from: FromNode::Pause(Duration::from_secs(3)) });
    say(&mut s, at(5), PROVIDER, 3, 0, Event::Failed(failure));
    assert_eq!(sent(&mut s), []);
    let usage = Usage::default();
    say(&mut s, at(100), OURS, 1, 0, Event::Finished { reason: Finish::Stop, text: String::new(), usage });
    assert_eq!(sent(&mut s), [(OURS, 2, MODEL, 0)]);
    assert_eq!(s.load().waiting, 2);
}

#[test]
fn whoever_takes_nothing_for_long_is_not_waited_for() {
    let mut s = house(true);
    s.handle(at(1), Input::Node { node: PROVIDER, from: FromNode::Pause(Duration::from_secs(600)) });
    submit(&mut s, at(2), 1, |ask| ask.model = THEIRS);
    let told = outputs(&mut s);
    let busy = |output: &Output| matches!(output, Output::Emit { event: Event::Failed(f), .. } if f.kind == FailureKind::Busy);
    assert!(told.iter().any(busy), "{told:?}");
}

/// Lets requests leave only while nodes of our own hold their model, and none of those has room.
struct WhenFull;

struct Full(bool);

impl Policy for WhenFull {
    fn begin<'a>(&'a self, _: &'a Ask<'a>, pool: &'a PoolView) -> Box<dyn Decision + 'a> {
        Box::new(Full(pool.own_holding > 0 && pool.own_free == 0))
    }

    fn looks_at_pool(&self) -> bool {
        true
    }
}

impl Decision for Full {
    fn admits(&self, offer: &Offer<'_>) -> Result<(), Denial<'_>> {
        match offer.trust == Trust::Provider && !self.0 {
            true => Err(Denial { rule: "spill", why: "there is room" }),
            false => Ok(()),
        }
    }

    fn cost(&self, offer: &Offer<'_>) -> f64 {
        offer.total.as_secs_f64()
    }
}

#[test]
fn policies_see_the_pool_by_the_model_that_was_asked_for() {
    let mut s = house(true);
    s.set_policy(at(0), Box::new(WhenFull));
    let spills = |ask: &mut Generate| ask.otherwise = vec![THEIRS];
    submit(&mut s, at(1), 1, spills);
    submit(&mut s, at(2), 2, spills);
    assert_eq!(sent(&mut s), [(OURS, 1, MODEL, 0), (PROVIDER, 2, THEIRS, 0)]);
    // When ours is gone, none holds it any more.
    s.handle(at(3), Input::Lost { node: OURS, reason: "gone".into() });
    submit(&mut s, at(4), 3, spills);
    assert_eq!(sent(&mut s), []);
}

#[test]
fn a_stream_moves_to_another_model_if_that_can_go_on() {
    for resumes in [true, false] {
        let mut s = house(resumes);
        submit(&mut s, at(1), 1, |ask| ask.otherwise = vec![THEIRS]);
        submit(&mut s, at(1), 2, |ask| (ask.model, ask.otherwise) = (THEIRS, vec![MODEL]));
        assert_eq!(sent(&mut s), [(OURS, 1, MODEL, 0), (PROVIDER, 2, THEIRS, 0)]);
        say(&mut s, at(10), OURS, 1, 0, token(0));
        say(&mut s, at(10), PROVIDER, 2, 0, token(0));
        outputs(&mut s);
        s.handle(at(20), Input::Lost { node: OURS, reason: "gone".into() });
        match resumes {
            true => assert_eq!(sent(&mut s), [(PROVIDER, 1, THEIRS, 1)]),
            false => assert_eq!(sent(&mut s), []),
        }
        s.handle(at(30), Input::Connected { node: NodeId(3), profile: profile("new", 2) });
        s.handle(at(40), Input::Lost { node: PROVIDER, reason: "gone".into() });
        let back: Vec<u64> = sent(&mut s).into_iter().map(|(_, id, ..)| id).collect();
        assert!(back.contains(&2), "from a provider to us: {back:?}");
    }
}

#[test]
fn a_provider_keeps_its_own_account() {
    let mut s = house(true);
    let (key, account) = allow(&mut s, 2200);
    submit(&mut s, at(1), 1, |ask| (ask.model, ask.key) = (THEIRS, key));
    sent(&mut s);
    assert_eq!(s.balance(&account).reserved, 4 * 3 * 10 + 10 * 100, "four times the prompt, as we count it");
    submit(&mut s, at(2), 2, |ask| (ask.model, ask.key) = (THEIRS, key));
    assert_eq!(sent(&mut s), [], "so much isn't left");
    say(&mut s, at(10), PROVIDER, 1, 0, token(0));
    let charged = FromNode::Charged { request: RequestId(1), attempt: 0, amount: 555 };
    s.handle(at(20), Input::Node { node: PROVIDER, from: charged.clone() });
    s.handle(at(20), Input::Node { node: OURS, from: charged });
    let usage = Usage::default();
    say(&mut s, at(20), PROVIDER, 1, 0, Event::Finished { reason: Finish::Stop, text: String::new(), usage });
    let told = outputs(&mut s);
    let spent = told.iter().position(|o| matches!(o, Output::Spent { amount: 555, .. }));
    let ended = told.iter().position(|o| matches!(o, Output::Emit { event: Event::Finished { .. }, .. }));
    assert!(spent.is_some() && spent < ended, "what it cost is said before its end: {told:?}");
    assert_eq!((s.balance(&account).spent, s.balance(&account).reserved), (555, 0));
    submit(&mut s, at(25), 3, |ask| (ask.model, ask.key) = (THEIRS, key));
    s.handle(at(26), Input::Cancel(RequestId(3)));
    assert_eq!(s.balance(&account).spent, 555 + 3 * 10, "its prompt was sent");
    // It charges three times what was reserved: that counts, and the next time it is reserved.
    submit(&mut s, at(30), 4, |ask| (ask.model, ask.key) = (THEIRS, key));
    let amount = 3 * s.balance(&account).reserved;
    s.handle(
        at(40),
        Input::Node { node: PROVIDER, from: FromNode::Charged { request: RequestId(4), attempt: 0, amount } },
    );
    say(&mut s, at(40), PROVIDER, 4, 0, Event::Finished { reason: Finish::Stop, text: String::new(), usage });
    assert_eq!(s.balance(&account).spent, 585 + amount);
    s.check();
    s.handle(at(50), Input::Keys([(key, "b".into())].into()));
    let limit = Limit { amount: u64::MAX, unit: Unit::NanoUsd, period: Period::Day };
    s.handle(at(50), Input::Allow(vec![Allowance { who: Who::Everybody, limit }]));
    submit(&mut s, at(60), 5, |ask| (ask.model, ask.key) = (THEIRS, key));
    let all = Account { holder: Holder::Everybody, ..account };
    assert!(s.balance(&all).reserved >= amount, "{:?}", s.balance(&all));
}

/// Whoever comes as a guest may say of himself what he likes.
#[test]
fn a_guest_keeps_no_account() {
    for unit in [Unit::NanoUsd, Unit::Tokens] {
        let mut s = Scheduler::new(Limits::default(), Box::new(Fastest), 1);
        let price = Price { prompt: 1000, output: 1000 };
        let guest = Profile { trust: Trust::Guest, price, ..profile("guest", 1) };
        s.handle(at(0), Input::Connected { node: OURS, profile: guest });
        let (key, account) = allow(&mut s, 1_000_000);
        let limit = Limit { amount: 1_000_000, unit, period: Period::Day };
        s.handle(at(0), Input::Allow(vec![Allowance { who: Who::Key("a".into()), limit }]));
        submit(&mut s, at(1), 1, |ask| ask.key = key);
        sent(&mut s);
        say(&mut s, at(10), OURS, 1, 0, token(0));
        let usage = Usage { prompt_tokens: u32::MAX, cached_tokens: 0, output_tokens: 1 };
        say(&mut s, at(20), OURS, 1, 0, Event::Finished { reason: Finish::Stop, text: String::new(), usage });
        let spent = if unit == Unit::Tokens { 3 + 1 } else { 0 };
        assert_eq!(s.balance(&Account { unit, ..account }).spent, spent, "{unit:?}");
        outputs(&mut s);
    }
}

/// What the driver can't write down ends a request, and its node goes on.
#[test]
fn what_cannot_be_booked_is_no_nodes_fault() {
    let mut s = house(true);
    for id in 0..5 {
        submit(&mut s, at(id), id, |_| ());
        assert_eq!(sent(&mut s).len(), 1, "the node isn't resting");
        let kind = FailureKind::Budget { after_s: 5 };
        say(&mut s, at(id), OURS, id, 0, Event::Failed(Failure { kind, message: "disk".into() }));
        let told = outputs(&mut s);
        let failed = |o: &Output| matches!(o, Output::Emit { event: Event::Failed(failure), .. } if failure.kind == kind);
        assert!(told.iter().any(failed), "{told:?}");
    }
}

#[test]
fn who_cannot_follow_grammars_is_not_asked_to() {
    let mut s = Scheduler::new(Limits::default(), Box::new(Fastest), 1);
    let mut plain = profile("plain", 1);
    plain.models[0].grammars = false;
    s.handle(at(0), Input::Connected { node: NodeId(1), profile: plain });
    submit(&mut s, at(1), 1, |ask| ask.grammar = Some("start: \"a\"".into()));
    let failed = |output: &Output| matches!(output, Output::Emit { event: Event::Failed(_), .. });
    assert!(outputs(&mut s).iter().any(failed), "nobody else is there");
    s.handle(at(2), Input::Connected { node: NodeId(2), profile: profile("able", 2) });
    submit(&mut s, at(3), 2, |ask| ask.grammar = Some("start: \"a\"".into()));
    submit(&mut s, at(3), 3, |_| {});
    let sent = sent(&mut s);
    assert_eq!(sent[0], (NodeId(2), 2, MODEL, 0));
    assert_eq!(sent.len(), 2, "what has no grammar goes anywhere: {sent:?}");
}
