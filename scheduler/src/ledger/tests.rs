use super::*;

const HOUR: i64 = 3600;

fn limit(amount: u64, unit: Unit, period: Period) -> Limit {
    Limit { amount, unit, period }
}

fn key(name: &str, limit: Limit) -> Allowance {
    Allowance { who: Who::Key(name.into()), limit }
}

/// A ledger with a key, its number 1, that may have so much in an hour.
fn ledger(allowances: Vec<Allowance>) -> Ledger {
    let mut ledger = Ledger::default();
    ledger.name([(KeyId(1), "a".into())].into());
    ledger.allow(allowances);
    ledger
}

fn reserve(ledger: &mut Ledger, request: u64, nano_usd: u64, at: i64) -> bool {
    let accounts = ledger.accounts_of(KeyId(1), &[]);
    let worst = Amount { nano_usd, tokens: 0 };
    ledger.reserve((KeyId(1), RequestId(request), 0), &accounts, worst, at).is_ok()
}

fn settle(ledger: &mut Ledger, request: u64, nano_usd: u64) -> u64 {
    ledger.settle(RequestId(request), 0, Amount { nano_usd, tokens: 0 }).expect("it was reserved").nano_usd
}

fn balance(ledger: &Ledger) -> (u64, u64) {
    let account = Account { holder: Holder::Key("a".into()), unit: Unit::NanoUsd, period: Period::Hour };
    let balance = ledger.balance(&account);
    (balance.spent, balance.reserved)
}

#[test]
fn concurrent_requests_cannot_overspend() {
    let mut ledger = ledger(vec![key("a", limit(90, Unit::NanoUsd, Period::Hour))]);
    assert!(reserve(&mut ledger, 1, 60, 0));
    assert!(!reserve(&mut ledger, 2, 31, 0), "30 are left");
    assert!(reserve(&mut ledger, 2, 30, 0));
    ledger.check(2);
    assert_eq!(settle(&mut ledger, 1, 20), 20);
    assert_eq!(ledger.settle(RequestId(1), 0, Amount::default()), None, "once");
    assert_eq!(settle(&mut ledger, 2, 99), 30, "no more than was reserved");
    assert_eq!(balance(&ledger), (50, 0));
    assert!(ledger.accounts_of(KeyId(2), &[]).is_empty(), "another key has no limit");
    ledger.check(0);
}

#[test]
fn what_a_provider_charges_counts_even_if_it_is_more() {
    let mut ledger = ledger(vec![key("a", limit(90, Unit::NanoUsd, Period::Hour))]);
    assert!(reserve(&mut ledger, 1, 60, 0));
    assert_eq!(ledger.charge(RequestId(1), 0, 100), Some(60));
    assert_eq!(settle(&mut ledger, 1, 0), 100);
    ledger.check(0);
    assert!(!reserve(&mut ledger, 2, 1, 0), "nothing is left, and nothing more is given");
    assert!(reserve(&mut ledger, 2, 1, HOUR));
}

#[test]
fn a_window_turns_and_what_began_in_the_one_before_counts_there() {
    let mut ledger = ledger(vec![key("a", limit(90, Unit::NanoUsd, Period::Hour))]);
    assert!(reserve(&mut ledger, 1, 90, HOUR - 1));
    assert!(!reserve(&mut ledger, 2, 1, HOUR - 1));
    assert!(reserve(&mut ledger, 2, 80, HOUR));
    assert_eq!(settle(&mut ledger, 1, 90), 90);
    assert_eq!(balance(&ledger), (0, 80));
    assert!(!reserve(&mut ledger, 3, 80, 0), "a clock that is put back brings no window back");
    ledger.check(1);
}

#[test]
fn all_accounts_of_a_request_must_have_enough() {
    let tag = |value: Option<&str>, amount| Allowance {
        who: Who::Tag("team".into(), value.map(Into::into)),
        limit: limit(amount, Unit::Tokens, Period::Day),
    };
    let everybody = Allowance { who: Who::Everybody, limit: limit(3, Unit::Requests, Period::Minute) };
    let mut ledger = ledger(vec![
        tag(None, 100),
        tag(Some("red"), 50),
        everybody,
        key("a", limit(9, Unit::Tokens, Period::Day)),
    ]);
    let mut asks = |key: u64, team: &str, request: u64, tokens: u64| {
        let tags = [("team".to_owned(), team.to_owned()), ("team".to_owned(), "blue".to_owned())];
        let accounts = ledger.accounts_of(KeyId(key), &tags);
        let worst = Amount { nano_usd: 0, tokens };
        let done = ledger.reserve((KeyId(key), RequestId(request), 0), &accounts, worst, 0);
        done.map(|entries| entries.len()).map_err(|lack| lack.account.holder)
    };
    assert_eq!(asks(0, "red", 1, 50), Ok(1), "the lesser of two limits for one account");
    assert_eq!(asks(0, "red", 2, 1), Err(Holder::Tag("team".into(), "red".into())));
    assert_eq!(asks(0, "green", 2, 100), Ok(1), "each value has its own");
    assert_eq!(asks(1, "pink", 3, 10), Err(Holder::Key("a".into())));
    assert_eq!(asks(1, "pink", 3, 9), Ok(2));
    let accounts = ledger.accounts_of(KeyId(0), &[]);
    for _ in 0..3 {
        ledger.count(&accounts, 5).unwrap();
    }
    let lack = ledger.count(&accounts, 5).unwrap_err();
    assert_eq!((lack.is_rate(), lack.after_s()), (true, 55));
    assert_eq!(
        lack.to_string(),
        "everybody together may have 3 requests in any minute, of which 0 requests are left; the next minute begins in 55 s"
    );
    ledger.count(&accounts, 60).unwrap();
    ledger.check(3);
}

#[test]
fn values_of_tags_cannot_fill_the_memory() {
    let who = Who::Tag("user".into(), None);
    let mut ledger = ledger(vec![Allowance { who, limit: limit(1, Unit::Requests, Period::Minute) }]);
    let ask = |ledger: &mut Ledger, user: usize, at| {
        let accounts = ledger.accounts_of(KeyId(0), &[("user".into(), user.to_string())]);
        ledger.count(&accounts, at).is_ok()
    };
    let admitted = (0..ACCOUNTS_MAX + 100).filter(|user| ask(&mut ledger, *user, 0)).count();
    assert_eq!(admitted, ACCOUNTS_MAX + 1, "those beyond share one account");
    for user in 0..10 {
        assert!(ask(&mut ledger, ACCOUNTS_MAX + user, 60), "later there is room again");
    }
}

/// SplitMix64.
fn below(random: &mut u64, n: u64) -> u64 {
    *random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *random;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) % n
}

/// What a process has put on disk, by account and window: settled and held. What it does survives it.
#[derive(Default)]
struct Disk(BTreeMap<(Account, i64), (u64, u64)>);

impl Disk {
    fn put(&mut self, entries: &[Entry], settles: bool) {
        for entry in entries {
            let row = self.0.entry((entry.account.clone(), entry.window)).or_default();
            match settles {
                true => *row = (row.0 + entry.spent, row.1 - entry.reserved),
                false => row.1 += entry.reserved,
            }
        }
    }
}

/// Random requests on random accounts over days, where the process dies now and then and finds what it had put on disk:
/// what was truly spent is never more than the ledger says, and that never more than was spent and was under way at a
/// death; and no limit is passed.
fn check(seed: u64) {
    let random = &mut { seed };
    let units = [Unit::NanoUsd, Unit::Tokens];
    let mut allowances = Vec::new();
    for _ in 0..1 + below(random, 5) {
        let unit = units[below(random, 2) as usize];
        let period = Period::ALL[below(random, 4) as usize];
        let who = match below(random, 4) {
            0 => Who::Key("a".into()),
            1 => Who::Tag("t".into(), None),
            2 => Who::Tag("t".into(), Some("1".into())),
            _ => Who::Everybody,
        };
        allowances.push(Allowance { who, limit: limit(below(random, 2000), unit, period) });
    }
    let mut ledger = ledger(allowances.clone());
    let (mut disk, mut unix_s) = (Disk::default(), 1_700_000_000 + below(random, 10_000_000) as i64);
    let mut spent: BTreeMap<(Account, i64), u64> = BTreeMap::new();
    let mut at_deaths: BTreeMap<(Account, i64), u64> = BTreeMap::new();
    let mut open: Vec<(u64, Amount, Vec<Entry>)> = Vec::new();
    for request in 0..2000 {
        unix_s += below(random, 3) as i64 * below(random, 600) as i64;
        let tags = [("t".to_owned(), below(random, 3).to_string())];
        let accounts = ledger.accounts_of(KeyId(below(random, 2)), &tags);
        let worst = Amount { nano_usd: below(random, 200), tokens: below(random, 200) };
        if let Ok(entries) = ledger.reserve((KeyId(1), RequestId(request), 0), &accounts, worst, unix_s) {
            disk.put(&entries, false);
            open.push((request, worst, entries));
        }
        if below(random, 3) > 0 && !open.is_empty() {
            let (request, worst, entries) = open.swap_remove(below(random, open.len() as u64) as usize);
            let took = Amount {
                nano_usd: below(random, worst.nano_usd + 1),
                tokens: below(random, worst.tokens + 1),
            };
            for entry in entries {
                *spent.entry((entry.account.clone(), entry.window)).or_default() +=
                    took.of(entry.account.unit);
            }
            let settled = ledger.settle(RequestId(request), 0, took).expect("it was reserved");
            disk.put(&settled.entries, true);
        }
        if below(random, 400) == 0 {
            for (_, _, entries) in open.drain(..) {
                for entry in entries {
                    // What becomes of it nobody hears: all of it was spent, or none.
                    let truly = below(random, 2) * entry.reserved;
                    *spent.entry((entry.account.clone(), entry.window)).or_default() += truly;
                    *at_deaths.entry((entry.account, entry.window)).or_default() += entry.reserved - truly;
                }
            }
            ledger = Ledger::default();
            ledger.name([(KeyId(1), "a".into())].into());
            ledger.allow(allowances.clone());
            for ((account, window), row) in &mut disk.0 {
                *row = (row.0 + row.1, 0);
                ledger.book(account.clone(), *window, row.0);
            }
        }
        ledger.check(open.len());
    }
    for ((account, window), (settled, held)) in &disk.0 {
        let at = (account.clone(), *window);
        let spent = spent.get(&at).copied().unwrap_or(0);
        let died = at_deaths.get(&at).copied().unwrap_or(0);
        let limit = ledger.limit(account).expect("it has one");
        assert_eq!(
            *settled,
            spent + died,
            "{account:?}: exactly what was spent, and what was under way at a death"
        );
        assert!(settled + held <= limit, "{account:?}: {settled} and {held} of {limit}");
    }
}

#[test]
fn whatever_happens_spend_is_at_most_the_ledger_and_that_at_most_the_limit() {
    for seed in 0..200 {
        if let Err(panic) = std::panic::catch_unwind(|| check(seed)) {
            eprintln!("seed {seed} fails");
            std::panic::resume_unwind(panic);
        }
    }
    println!("200 seeds");
}
