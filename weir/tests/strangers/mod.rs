//! Strangers who want no good, over QUIC.
mod house;

use house::{House, ask};
use std::time::Duration;
use weir_backends::null::Null;
use weir_node::LoadOptions;
use weir_scheduler::{Event, RequestId};
use weir_transport::{Frame, Hello, Identity, LinkError, Message, RefusalCode, VERSION};

async fn answers(house: &House, n: u32) {
    let mut generation = house.driver.generate(ask(n)).await.unwrap();
    let mut events = Vec::new();
    while let Some(event) = generation.events.recv().await {
        events.push(event);
    }
    assert!(matches!(events.last(), Some(Event::Finished { .. })), "{events:?}");
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
        let mut stream = link.open().await.unwrap();
        let token = Some(house.token(1));
        let hello = Hello { versions: vec![VERSION], name: "bad".into(), proof, token, ..Hello::default() };
        stream.send.send(Frame::hello(&hello)).await.unwrap();
        let frame = stream.receive.next().await.unwrap().unwrap();
        let Message::Welcome(welcome) = frame.read().unwrap() else { panic!("{frame:?}") };
        assert_eq!(welcome.refused.unwrap().code, RefusalCode::Proof);
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
