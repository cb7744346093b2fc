//! Accounts as text: `usd/day/key:NAME`, `tokens/hour/tag:LENGTH:NAME:VALUE`, `usd/month/all`.
use weir_scheduler::{Account, Holder, Period, Unit};

/// What an account is called on disk and between schedulers.
pub(super) fn name(account: &Account) -> String {
    let unit = match account.unit {
        Unit::NanoUsd => "usd",
        Unit::Tokens => "tokens",
        Unit::Requests => "requests",
    };
    let holder = match &account.holder {
        Holder::Key(name) => format!("key:{name}"),
        Holder::Tag(name, value) => format!("tag:{}:{name}:{value}", name.len()),
        Holder::Everybody => "all".into(),
    };
    format!("{unit}/{}/{holder}", account.period.name())
}

/// The account of that name.
pub(super) fn account(name: &str) -> Option<Account> {
    let mut parts = name.splitn(3, '/');
    let unit = match parts.next()? {
        "usd" => Unit::NanoUsd,
        "tokens" => Unit::Tokens,
        "requests" => Unit::Requests,
        _ => return None,
    };
    let (period, holder) = (Period::named(parts.next()?)?, parts.next()?);
    let holder = match holder.split_once(':') {
        None if holder == "all" => Holder::Everybody,
        Some(("key", name)) => Holder::Key(name.into()),
        Some(("tag", rest)) => {
            let (length, rest) = rest.split_once(':')?;
            let (name, value) = rest.split_at_checked(length.parse().ok()?)?;
            Holder::Tag(name.into(), value.strip_prefix(':')?.into())
        }
        _ => return None,
    };
    Some(Account { holder, unit, period })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_accounts_lead_back_to_them() {
        let holders = [
            Holder::Everybody,
            Holder::Key("a/b:c".into()),
            Holder::Tag("te:am/".into(), "r/e:d".into()),
            Holder::Tag("é".into(), "".into()),
        ];
        for holder in holders {
            for unit in [Unit::NanoUsd, Unit::Tokens, Unit::Requests] {
                for period in Period::ALL {
                    let one = Account { holder: holder.clone(), unit, period };
                    assert_eq!(account(&name(&one)), Some(one));
                }
            }
        }
        for wrong in ["", "usd", "usd/day", "usd/day/everybody", "usd/day/tag:9:x:y", "eur/day/all"] {
            assert_eq!(account(wrong), None, "{wrong}");
        }
    }
}
