//! A mail server that takes mails from who has logged in, and a password that is rotated while notification runs.

use crate::notification::{dead_letters, flags, seed, until_empty, watched};
use crate::support::app::App;
use crate::support::eventually;
use crate::support::mails::Mails;
use crate::support::postgres::Postgres;
use contract::CheckStatus;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_is_rotated_is_used_without_a_restart() {
    const SECOND: &str = "se:co\\nd@% ä";
    let (postgres, mails) = (Postgres::start().await, Mails::start());
    App::start(&postgres, "booking-1").await.end().await;
    let password = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(password.path(), "first \"password\"\n").unwrap();
    let login = |password: &str| json!({"login": {"user": "tickets", "password": password}});
    mails.behave(login("first \"password\"")).await;
    let file = password.path().display().to_string();
    let settings = [("--smtp-user", "tickets"), ("--smtp-password-file", file.as_str())];
    let notification = App::notification_with(&postgres, &mails, &settings).await;
    notification.push(watched(), flags(true, true)).await;
    seed(&postgres, 1, &["a.example"]).await;
    until_empty(&postgres).await;

    // Sessions that are there go on.
    eventually("no session is left", async || (mails.stats().await.open == 0).then_some(())).await;
    mails.behave(login(SECOND)).await;
    seed(&postgres, 2, &["a.example", "b.example"]).await;
    let check = notification.check("mail", "it is said", |check| check.status == CheckStatus::Unhealthy).await;
    assert!(check.message.contains("at AUTH: 535 5.7.8"), "{check:?}");
    std::fs::write(password.path(), format!("{SECOND}\n")).unwrap();
    until_empty(&postgres).await;
    assert_eq!((mails.all().await.len(), dead_letters(&postgres).await), (3, 0));
    notification.check("mail", "all is well again", |check| check.status == CheckStatus::Healthy).await;

    // As after a Secret that was deleted: the last one stays in use.
    eventually("no session is left", async || (mails.stats().await.open == 0).then_some(())).await;
    std::fs::write(password.path(), "").unwrap();
    seed(&postgres, 1, &["a.example"]).await;
    until_empty(&postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_password_mails_wait_and_the_check_says_why() {
    let (postgres, mails) = (Postgres::start().await, Mails::start());
    App::start(&postgres, "booking-1").await.end().await;
    mails.behave(json!({"login": {"user": "tickets", "password": "here"}})).await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("password");
    let file = path.display().to_string();
    let settings = [("--smtp-user", "tickets"), ("--smtp-password-file", file.as_str())];
    let notification = App::notification_with(&postgres, &mails, &settings).await;
    notification.push(watched(), flags(true, true)).await;
    seed(&postgres, 1, &["a.example"]).await;
    let check = notification.check("mail", "it is said", |check| check.status == CheckStatus::Unhealthy).await;
    assert!(check.message.contains("cannot be used: No such file"), "{check:?}");
    std::fs::write(&path, "here").unwrap();
    until_empty(&postgres).await;
    assert_eq!((mails.all().await.len(), dead_letters(&postgres).await), (1, 0));
}
