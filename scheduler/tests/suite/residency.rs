//! Single rules of what nodes hold.
use crate::samples::{ask, profile};
use std::time::Duration;
use weir_scheduler::{
    Class, Event, FailureKind, Fastest, FromNode, Held, Input, Limits, ModelId, NodeId, Offered, Output,
    Profile, Scheduler, Time, ToNode, Wanted,
};

const GB: u64 = 1_000_000_000;
const SMALL: ModelId = ModelId([1; 32]);
const LARGE: ModelId = ModelId([2; 32]);

fn at(s: u64) -> Time {
    Time(s * GB)
}

/// A node that has taken so many orders, holds these models, and could load others into what is free.
fn member(orders: u64, free: u64, held: &[(ModelId, u64, bool)], offers: &[(ModelId, u64)]) -> Profile {
    let mut profile = profile("attic", 4);
    let sample = profile.models.remove(0);
    let hold = |(model, bytes, pinned): &(ModelId, u64, bool)| Held {
        model: *model,
        bytes: *bytes,
        weights: *bytes,
        pinned: *pinned,
        ..sample.clone()
    };
    let offer = |(model, bytes): &(ModelId, u64)| Offered {
        model: *model,
        name: format!("m{}", model.0[0]),
        weights: *bytes,
        bytes: *bytes,
    };
    Profile {
        models: held.iter().map(hold).collect(),
        offers: offers.iter().map(offer).collect(),
        memory_free: free,
        orders,
        ..profile
    }
}

fn connect(scheduler: &mut Scheduler, node: u64, profile: Profile) {
    scheduler.handle(Time::ZERO, Input::Connected { node: NodeId(node), profile });
}

fn scheduler() -> Scheduler {
    Scheduler::new(Limits::default(), Box::new(Fastest), 1)
}

fn outputs(scheduler: &mut Scheduler) -> Vec<Output> {
    std::iter::from_fn(|| scheduler.poll()).collect()
}

fn want(scheduler: &mut Scheduler, now: Time, want: u64, model: Wanted) -> Vec<Output> {
    scheduler.handle(now, Input::Want { want, model });
    outputs(scheduler)
}

fn load(node: u64, number: u64, model: ModelId, bytes: u64) -> Output {
    Output::Send { node: NodeId(node), message: ToNode::Load { number, model, bytes } }
}

fn says(scheduler: &mut Scheduler, now: Time, profile: Profile) -> Vec<Output> {
    scheduler.handle(now, Input::Node { node: NodeId(0), from: FromNode::Profile(profile) });
    outputs(scheduler)
}

#[test]
fn a_wanted_model_is_loaded_once_and_asked_for_then() {
    let mut s = scheduler();
    connect(&mut s, 0, member(0, 8 * GB, &[], &[(SMALL, 2 * GB)]));
    assert_eq!(want(&mut s, at(1), 1, Wanted::Model(SMALL)), [load(0, 1, SMALL, 2 * GB)]);
    assert_eq!(want(&mut s, at(1), 2, Wanted::Model(SMALL)), []);
    s.handle(at(2), Input::Submit(Box::new(weir_scheduler::Generate { model: SMALL, ..ask(1, vec![1], 5) })));
    assert_eq!(outputs(&mut s), [], "a request waits as well");
    let told = says(&mut s, at(3), member(1, 6 * GB, &[(SMALL, 2 * GB, false)], &[(SMALL, 2 * GB)]));
    for wanted in [1, 2] {
        assert!(told.contains(&Output::Found { want: wanted, found: Ok(SMALL) }), "{told:?}");
    }
    assert!(told.iter().any(|o| matches!(o, Output::Send { message: ToNode::Generate(_), .. })), "{told:?}");
}

#[test]
fn what_fits_nowhere_is_refused_with_the_nearest_miss() {
    let mut s = scheduler();
    let pinned = [(SMALL, 4_100_000_000, true)];
    connect(&mut s, 0, member(0, 3_900_000_000, &pinned, &[(LARGE, 4_600_000_000)]));
    connect(&mut s, 1, member(0, GB, &[], &[(LARGE, 4_600_000_000)]));
    let told = want(&mut s, at(1), 1, Wanted::Model(LARGE));
    let [Output::Found { found: Err(failure), .. }] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(failure.kind, FailureKind::NoModel);
    assert_eq!(failure.message, "m2 needs 4.6 GB; the closest is attic with 3.9 GB free of 8.0 GB");
    s.handle(at(2), Input::Submit(Box::new(weir_scheduler::Generate { model: LARGE, ..ask(1, vec![1], 5) })));
    let told = outputs(&mut s);
    let [Output::Emit { event: Event::Failed(again), .. }] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(again.message, failure.message);
}

#[test]
fn idle_models_make_room_and_pinned_ones_do_not() {
    let offers = [(SMALL, 3 * GB), (LARGE, 6 * GB)];
    let unload = |number, model| Output::Send { node: NodeId(0), message: ToNode::Unload { number, model } };
    let mut s = scheduler();
    connect(&mut s, 0, member(0, 5 * GB, &[(SMALL, 3 * GB, false)], &offers));
    assert_eq!(want(&mut s, at(1), 1, Wanted::Model(LARGE)), [], "it was used a moment ago");
    s.handle(at(12), Input::Tick);
    assert_eq!(outputs(&mut s), [unload(1, SMALL)]);
    // What the node said before it had the order changes nothing.
    assert_eq!(says(&mut s, at(12), member(0, 5 * GB, &[(SMALL, 3 * GB, false)], &offers)), []);
    assert_eq!(says(&mut s, at(13), member(1, 8 * GB, &[], &offers)), [load(0, 2, LARGE, 6 * GB)]);
    assert_eq!(says(&mut s, at(13), member(1, 8 * GB, &[], &offers)), [], "the memory is promised");

    let mut s = scheduler();
    connect(&mut s, 0, member(0, 5 * GB, &[(SMALL, 3 * GB, true)], &offers));
    let told = want(&mut s, at(20), 1, Wanted::Model(LARGE));
    assert!(matches!(told.as_slice(), [Output::Found { found: Err(_), .. }]), "{told:?}");
    s.handle(at(2000), Input::Tick);
    assert!(
        !outputs(&mut s).iter().any(|o| matches!(o, Output::Send { .. })),
        "it stays though nobody asks for it"
    );
}

#[test]
fn a_model_that_nobody_asks_for_is_unloaded() {
    let mut s = Scheduler::new(
        Limits { lost_after: Duration::from_secs(1 << 20), ..Limits::default() },
        Box::new(Fastest),
        1,
    );
    connect(&mut s, 0, member(0, GB, &[(SMALL, GB, false)], &[]));
    for now in (0..930).step_by(10) {
        s.handle(at(now), Input::Tick);
    }
    let order = Output::Send { node: NodeId(0), message: ToNode::Unload { number: 1, model: SMALL } };
    assert_eq!(outputs(&mut s), [order]);
}

#[test]
fn a_failed_load_is_tried_elsewhere_and_then_told() {
    let offers = [(SMALL, GB)];
    let mut s = scheduler();
    connect(&mut s, 0, member(0, 2 * GB, &[], &offers));
    connect(&mut s, 1, member(0, GB, &[], &offers));
    assert_eq!(want(&mut s, at(1), 1, Wanted::Model(SMALL)), [load(0, 1, SMALL, GB)]);
    let failed = |orders| Profile {
        failures: vec![(SMALL, "the disk is full".into())],
        ..member(orders, 2 * GB, &[], &offers)
    };
    assert_eq!(says(&mut s, at(1), failed(0)), [], "that was before the order");
    assert_eq!(says(&mut s, at(2), failed(1)), [load(1, 1, SMALL, GB)]);
    let from = FromNode::Profile(failed(1));
    s.handle(at(2), Input::Node { node: NodeId(1), from });
    let told = outputs(&mut s);
    let [Output::Found { found: Err(failure), .. }] = told.as_slice() else { panic!("{told:?}") };
    assert!(failure.message.contains("the disk is full"), "{}", failure.message);
}

#[test]
fn classes_are_what_the_pool_holds() {
    let mut s = scheduler();
    let check = |s: &mut Scheduler, class, expected: Option<ModelId>| {
        let told = want(s, at(1), 1, Wanted::Class(class));
        let found = told.iter().find_map(|o| match o {
            Output::Found { found, .. } => found.clone().ok(),
            Output::Send { message: ToNode::Load { model, .. }, .. } => Some(*model),
            _ => None,
        });
        assert_eq!(found, expected, "{class:?}: {told:?}");
    };
    check(&mut s, Class::Auto, None);
    connect(&mut s, 0, member(0, 9 * GB, &[], &[(SMALL, GB), (LARGE, 8 * GB)]));
    check(&mut s, Class::Large, Some(LARGE));
    connect(&mut s, 1, member(0, 0, &[(SMALL, GB, true), (LARGE, 8 * GB, true)], &[]));
    outputs(&mut s);
    for (class, expected) in
        [(Class::Small, SMALL), (Class::Medium, LARGE), (Class::Large, LARGE), (Class::Auto, LARGE)]
    {
        check(&mut s, class, Some(expected));
    }
}

/// A load took as long as that; from then on it is predicted by it.
fn loads(scheduler: &mut Scheduler, node: u64, number: u64, from: Time, to: Time, offers: &[(ModelId, u64)]) {
    let profile = |orders, free, held: &[(ModelId, u64, bool)]| member(orders, free, held, offers);
    let say = |profile| Input::Node { node: NodeId(node), from: FromNode::Profile(profile) };
    let told = want(scheduler, from, 1000 + number, Wanted::Model(SMALL));
    assert!(told.contains(&load(node, number, SMALL, GB)), "{told:?}");
    scheduler.handle(to, say(profile(number, 7 * GB, &[(SMALL, GB, false)])));
    outputs(scheduler);
}

#[test]
fn a_model_is_loaded_where_that_is_sooner() {
    let offers = [(SMALL, GB), (LARGE, 2 * GB)];
    let mut s = scheduler();
    // Of two alike, one turns out to need a minute for a gigabyte.
    connect(&mut s, 0, member(0, 8 * GB, &[], &offers));
    loads(&mut s, 0, 1, at(1), at(61), &offers);
    s.handle(at(61), Input::Connected { node: NodeId(1), profile: member(0, 8 * GB, &[], &offers) });
    assert_eq!(want(&mut s, at(61), 1, Wanted::Model(LARGE)), [load(1, 1, LARGE, 2 * GB)]);

    // One that is far away has it later than one next door.
    let mut s = scheduler();
    connect(&mut s, 0, member(0, 8 * GB, &[], &offers));
    connect(&mut s, 1, member(0, 8 * GB, &[], &offers));
    s.handle(at(1), Input::RoundTrip { node: NodeId(0), time: Duration::from_secs(1) });
    assert_eq!(want(&mut s, at(1), 1, Wanted::Model(LARGE)), [load(1, 1, LARGE, 2 * GB)]);
}

#[test]
fn what_takes_too_long_to_load_is_refused_at_once() {
    let offers = [(SMALL, GB)];
    let ask = |id, ttft| {
        let ttft = Some(Duration::from_secs(ttft));
        Input::Submit(Box::new(weir_scheduler::Generate { model: SMALL, ttft, ..ask(id, vec![1], 5) }))
    };
    let mut s = scheduler();
    connect(&mut s, 0, member(0, 8 * GB, &[], &offers));
    s.handle(at(1), ask(1, 5));
    assert_eq!(outputs(&mut s), [load(0, 1, SMALL, GB)], "two seconds are enough, as far as we know");
    let mut s = scheduler();
    connect(&mut s, 0, member(0, 8 * GB, &[], &offers));
    loads(&mut s, 0, 1, at(1), at(61), &offers);
    let from = FromNode::Profile(member(1, 8 * GB, &[], &offers));
    s.handle(at(62), Input::Node { node: NodeId(0), from });
    s.handle(at(62), ask(1, 5));
    let told = outputs(&mut s);
    let [Output::Emit { event: Event::Failed(failure), .. }] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(failure.kind, FailureKind::Deadline);
    assert!(failure.message.contains("the soonest would take about 6"), "{}", failure.message);
    s.handle(at(62), ask(2, 100));
    assert_eq!(outputs(&mut s), [load(0, 2, SMALL, GB)]);
}

/// Requests wait for a model's only holder; another node could load it.
#[test]
fn a_further_node_loads_what_is_crowded_if_that_is_sooner_than_waiting() {
    let check = |waiting: u64, weights: u64, expected: bool| {
        let offers = [(SMALL, weights)];
        let mut s = Scheduler::new(
            Limits { lost_after: Duration::from_secs(1 << 20), ..Limits::default() },
            Box::new(Fastest),
            1,
        );
        connect(&mut s, 0, member(0, 0, &[(SMALL, GB, true)], &[]));
        connect(&mut s, 1, member(0, 100 * GB, &[], &offers));
        for id in 0..4 + waiting {
            let ask = weir_scheduler::Generate { model: SMALL, ..ask(id, vec![1], 500) };
            s.handle(at(1), Input::Submit(Box::new(ask)));
        }
        outputs(&mut s);
        for node in [0, 1] {
            let from = FromNode::Status(weir_scheduler::Status::default());
            s.handle(at(7), Input::Node { node: NodeId(node), from });
        }
        s.handle(at(7), Input::Tick);
        let loads = outputs(&mut s).contains(&load(1, 1, SMALL, weights));
        assert_eq!(loads, expected, "{waiting} wait for what has {weights} bytes");
    };
    // A slot becomes free every 1.3 s; half a gigabyte is loaded in a second.
    check(20, 2 * GB, true);
    check(2, 50 * GB, false);
}
