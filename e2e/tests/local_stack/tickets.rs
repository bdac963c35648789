//! The key that tickets are signed with: missing, replaced, revoked; and what is said of tickets that are about already.

use crate::fixture::{Fixture, OPENING_NIGHT, Seen};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use contract::CheckStatus;
use e2e::local_stack::Port;
use rcgen::SigningKey;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::process::Command;

/// A private key, as its file has it.
struct Key(rcgen::KeyPair);

impl Key {
    fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap();
        Self(rcgen::KeyPair::from_pkcs8_pem_and_sign_algo(&text, &rcgen::PKCS_ED25519).unwrap())
    }

    /// The beginning of its hash.
    fn id(&self) -> [u8; 8] {
        *Sha256::digest(self.0.public_key_raw()).first_chunk().unwrap()
    }

    fn id_in_words(&self) -> String {
        format!("{:016x}", u64::from_be_bytes(self.id()))
    }

    /// The code of the one seat of a booking, as on its ticket.
    fn code(&self, booked: &Seen) -> String {
        let bytes = |id: &str| u128::from_str_radix(&id.replace('-', ""), 16).unwrap().to_be_bytes();
        let booking = bytes(booked.body["bookingId"].as_str().unwrap());
        let payload = [&self.id()[..], &booking, &bytes(OPENING_NIGHT), &[1, 1]].concat();
        let signed = format!("TW1.{}", URL_SAFE_NO_PAD.encode(payload));
        let signature = self.0.sign(signed.as_bytes()).unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// What the entrance is told: that it is valid, or why not.
async fn shown(fixture: &Fixture, code: &str) -> (String, Duration) {
    let seen = fixture.get(Port::Gateway, &format!("/api/tickets/{code}")).await;
    assert_eq!(seen.status, 200, "{}", seen.body);
    let word = if seen.body["valid"] == true { "valid" } else { seen.body["reason"].as_str().unwrap() };
    (word.to_owned(), seen.took)
}

/// Waits for a mail of this kind about a booking, and says how it ends.
pub async fn mail(fixture: &Fixture, booked: &Seen, kind: &str) -> String {
    let id = format!("<{}.{kind}@ticketwave>", booked.body["bookingId"].as_str().unwrap());
    let found = async || {
        let mails = fixture.get(Port::Mails, "/mails").await.body;
        let mut mails = mails["mails"].as_array().unwrap().iter();
        let text = mails.find(|mail| mail["messageId"] == id.as_str())?["text"].as_str()?.to_owned();
        Some(text)
    };
    fixture.until("the mail is there", async || found().await.is_some()).await;
    found().await.unwrap()
}

async fn ticket_key(fixture: &Fixture) -> (CheckStatus, String) {
    let report = fixture.check(Port::Notification, "ticket-key").await;
    (report.status, report.message)
}

/// The key is gone, another one takes its place, and the first one is revoked in the end.
pub async fn key_missing_and_replaced(fixture: &mut Fixture) {
    let path: PathBuf = fixture.stack.folder().join("ticket-key.pem");
    let first = Key::read(&path);
    let old = fixture.book().await;
    assert!(mail(fixture, &old, "BookingConfirmed").await.contains("Your ticket is attached"));
    let old = first.code(&old);
    assert_eq!(shown(fixture, &old).await.0, "valid");

    std::fs::remove_file(&path).unwrap();
    let is_missed = async || ticket_key(fixture).await.0 == CheckStatus::Unhealthy;
    let noticed = fixture.until("the check says it", is_missed).await;
    assert!(ticket_key(fixture).await.1.contains("tickets wait"));
    let new = fixture.book().await;
    assert_eq!(new.in_words(), "201 Confirmed");
    assert!(mail(fixture, &new, "BookingConfirmed").await.contains("Your ticket follows in another mail"));
    let (told, _) = shown(fixture, &old).await;
    assert_eq!(told, "valid", "without the key");

    let made = Command::new(fixture.stack.program()).args(["ticket-key", "new"]).arg(&path).output().await.unwrap();
    assert!(made.status.success(), "{made:?}");
    let begin = Instant::now();
    let second = Key::read(&path);
    assert!(mail(fixture, &new, "Ticket").await.contains("Your ticket is attached"));
    let followed = begin.elapsed();
    let fresh = second.code(&new);
    let (fresh_told, took) = shown(fixture, &fresh).await;
    assert_eq!((fresh_told.as_str(), shown(fixture, &old).await.0.as_str()), ("valid", "valid"));
    fixture.until_well().await;
    let metrics = format!("check ticket-key unhealthy after {} ms; tickets of both keys valid", noticed.as_millis());
    let sees = "201 Confirmed; the ticket follows by mail";
    fixture.record("ticket key missing, then another one", sees, new.took.max(took), followed, &metrics);

    let client = fixture.stack.connect().await.unwrap();
    let revoke = "UPDATE ticket_keys SET revoked_at = now() WHERE id = $1";
    assert_eq!(client.execute(revoke, &[&first.id_in_words()]).await.unwrap(), 1);
    let (told, took) = shown(fixture, &old).await;
    assert_eq!((told.as_str(), shown(fixture, &fresh).await.0.as_str()), ("KeyRevoked", "valid"));
    let well = fixture.until_well().await;
    let sees = "200, not valid: KeyRevoked; others valid";
    fixture.record("... and the first one revoked", sees, took, well, "nothing opened");
}
