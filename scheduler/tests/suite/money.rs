//! An account.
use weir_scheduler::{Account, Allowance, Holder, Input, KeyId, Limit, Period, Scheduler, Time, Unit, Who};

/// Lets a key spend so many billionths of a dollar a day: which key, and what its account is called.
pub(crate) fn allow(scheduler: &mut Scheduler, amount: u64) -> (KeyId, Account) {
    let (key, unit, period) = (KeyId(7), Unit::NanoUsd, Period::Day);
    scheduler.handle(Time::ZERO, Input::Keys([(key, "a".into())].into()));
    let (who, limit) = (Who::Key("a".into()), Limit { amount, unit, period });
    scheduler.handle(Time::ZERO, Input::Allow(vec![Allowance { who, limit }]));
    (key, Account { holder: Holder::Key("a".into()), unit, period })
}
