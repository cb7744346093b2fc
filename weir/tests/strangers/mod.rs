//! Strangers who want no good, over QUIC.
mod house;

use house::{House, ask};
use std::time::Duration;
use weir_backends::null::Null;
use weir_node::LoadOptions;
use weir_scheduler::{Event, RequestId, Trust};
use weir_transport::{Frame, Hello, Identity, Link, LinkError, Message, Proof, RefusalCode, VERSION};

async fn answers(house: &House, n: u32) {
    let mut generation = house.driver.generate(ask(n)).await.unwrap();
    let mut events = Vec::new();
    while let Some(event) = generation.events.recv().await {
        events.push(event);
    }
    assert!(matches!(events.last(), Some(Event::Finished { .. })), "{events:?}");
}

/// What a page will do: it comes by WebTransport on the same port, with a token and a key, and works as a guest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_browser_joins_as_a_guest_and_answers() {
    let house = House::open().await;
    let loaded = weir_node::null(&Null::default(), LoadOptions::default()).unwrap();
    house.join_by(house.dial_web().await, "tab", &loaded, &house.token(1));
    house.wait_for(1).await;
    let nodes = house.driver.survey().await;
    assert_eq!((nodes[0].view.name.as_str(), nodes[0].view.trust), ("tab", Trust::Guest));
    for n in 0..20 {
        answers(&house, n).await;
    }
    // A hello that was good for another session, and one without a token.
    let node = Identity::generate().unwrap();
    let other = house.dial_web().await;
    let mine = house.dial_web().await;
    let replayed = node.prove(&other.binding().unwrap());
    assert_eq!(told(&mine, Some(replayed), Some(house.token(1))).await, Some(RefusalCode::Proof));
    let own = node.prove(&other.binding().unwrap());
    assert_eq!(told(&other, Some(own), None).await, Some(RefusalCode::Token));
}

/// How the scheduler answers a hello.
async fn told(link: &Link, proof: Option<Proof>, token: Option<String>) -> Option<RefusalCode> {
    let mut stream = link.open().await.unwrap();
    let hello = Hello { versions: vec![VERSION], name: "bad".into(), proof, token, ..Hello::default() };
    stream.send.send(Frame::hello(&hello)).await.unwrap();
    let frame = stream.receive.next().await.unwrap().unwrap();
    let Message::Welcome(welcome) = frame.read().unwrap() else { panic!("{frame:?}") };
    welcome.refused.map(|refused| refused.code)
}

/// Links that say nothing, nonsense, or something out of place: each is cut, and a node at work notices nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_disturb_nobody() {
    let house = House::open().await;
    let loaded = weir_node::null(&Null::default(), LoadOptions::default()).unwrap();
    house.join("good", &loaded, &house.token(1)).await;
    house.wait_for(1).await;

    // What a stranger may say first, and what it is told.
    let generate = Frame::generate(ask(1)).unwrap();
    for (first, told) in [(generate, "Generate"), (Frame::cancel(RequestId(1), 0), "Cancel")] {
        let link = house.dial().await;
        let mut stream = link.open().await.unwrap();
        stream.send.send(first).await.unwrap();
        let Err(LinkError::Closed(why)) = stream.receive.next().await else { panic!("{told}") };
        assert!(why.contains(told), "{why}");
    }
    // A hello without a key, and one replayed from another link.
    let node = Identity::generate().unwrap();
    let other = house.dial().await;
    let replayed = node.prove(&other.binding().unwrap());
    for proof in [None, Some(replayed)] {
        let link = house.dial().await;
        assert_eq!(told(&link, proof, Some(house.token(1))).await, Some(RefusalCode::Proof));
    }
    // Those who only hold places: not all of them get one, and those who do lose it.
    let mut idle = Vec::new();
    for n in 0..200 {
        idle.push(house.dial().await);
        if n % 20 == 0 {
            answers(&house, n).await;
        }
    }
    let turned_away = tokio::time::timeout(Duration::from_secs(5), idle[199].closed()).await;
    assert!(turned_away.is_ok(), "an address has not so many places");
    for link in &idle {
        tokio::time::timeout(Duration::from_secs(20), link.closed()).await.expect("it is cut");
    }
    house.join("late", &loaded, &house.token(1)).await;
    house.wait_for(2).await;
    answers(&house, 7).await;
}
