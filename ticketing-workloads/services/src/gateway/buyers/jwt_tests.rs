//! Tokens that are to be taken, and all kinds that are not.

use super::jwt::{Algorithm, Claims, Expected, InvalidToken, MAX_TOKEN_BYTES, Unverified, check, signed_with};
use super::key_file::Keys;
use super::key_set::KeySet;
use super::local_token;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256, RSA_PKCS1_SHA512,
    RsaKeyPair,
};
use serde_json::{Value, json};
use std::time::Duration;

/// Made for these tests, and used nowhere else: ring makes no such keys.
const RSA_KEY: &str = "MIIEvAIBADANBgkqhkiG9w0BAQEFAASCBKYwggSiAgEAAoIBAQCnEJLbEUMfYmdOQ7ELkEXa+NwyX8DyfLG12UTZjan4TNVvpuE8s+FrsWnDGh\
     GpcPsPyMKLs0uYoNkWKod+KNIcD/zWUzXZPh5R/GrxwB/EkvJf9W1mqjhI1KiRGgotgw0JKt3B1jprEymwOrgmkt8t7QwTp0u05ZlnQp5M9hay\
     bwepRqxGrS+q8ak3JzWgLs7b/rVhL0+iGbdg3JvpMFlojidAmAMDluDOQvuqn6lpUAVQf7IdlnK+SHQGnNcFZYyPEvQP2CMZ4umtngi46ZBQnD\
     XDiVWI5ct4Nb94mhPZ4hM6P9b4q9S1T/4CJJWlCqACu55wxZ4nthiWnLxl4DLtAgMBAAECggEASxeSguA39PfkqlOX1TREid+5DfVnQzdUI4Jk\
     xYq8/uv+NcDjVcceyCrG+JiTnr83QgmBlIyDKrgFy8ZS/5x2kIGJKobdWefndf+IzGAIh3Fre0FUKsTRJr9bg1kagQl6RwgbBCD4Qh+radiC5G\
     e45Co79uuIBmf7M2RIxhwI6KtwcqkyIz3KU4G36npwK4q6f8esLbQGVbOQUmFIO9oGF7C2TrX3hZuH9uIscnIs+GYUDB2D/5tKtg2ooqjpqmBD\
     6vCxvYo94DFyFslu5Y6fKrIE3ByvkX9nk0EtfPZoPBSi3LV/iaG4mbLR1oqcKT0cx42uqS6GEJV7hAsFLHypOwKBgQDPpf+YS7dkss5c8ckJnl\
     p2pr+OmjXvEvOnolHRZJ2VgRv+imogHyT4gu8VPcY8i1jw4qZNQZBYE0CRW2VF/8/y5Wmm71oJVAnTptyms+h36zAW8WA6cnsto39IiSQIwfOK\
     dSUxm4Tn7N3yIAZPBk42RYMJnNpnAcv9j1y6Bj3DZwKBgQDN91238J57uPZF8DB3o//JtuB4D3kF0MRfHXD88FvyNr1YREMQIC21S3zATsQhRJ\
     LEF7INGPe7UCWWfnKVyTmnADe01BYC1/Oq9Ab3TOr6/B0flsK9L22Mhto8o23PzYDTeGlo99y4HXBrxV3CEvbq0CqnKnl1i3vvd4+sTqnWiwKB\
     gEgTOnDGd1XAqtigJEPub0AYCQ2agXYGggSB1xxzbC9krS7hJI0Zwl9wM0SQOKrzQ1/5i/fs9glcRWEu9Cwj6y5Iay/CjOIIBZEtrhE/CUX2oK\
     6WAezHp/Hjel7XG2bey4YXu11Iug02rqNIcmgjrCoyXpWLmFOA0CmnBWyclfupAoGAXYWa2nC5pbggqzUa7NhcxvzxA9MSwt8+q2m06kVBmsPc\
     Sf4E7YeO+akjJjcdu3VlpwCTansR0c3co28bHIRYV0o0ATnkHLpt/Av+NcCJWhmsJ7HPDxRAC/UXlz0mGZtYia09P9p8MGW9rFHb9smhsJGBLJ\
     KOwB7r0ZpadITrfW0CgYBu923L4yXEjrodXpq9J4020akczB+4E4HahfzuLp73M/BsGziQrj9+qOo3CL9GA24kFUCnJhTlQ2SN0/lDG+kVdfDX\
     rSvmNKc70+vQgJtehOF2QbtQFD/jrajrtpZNfYECyhCQw40EeTuKagHDOFA4dYWHA4eOBaAvzdfuIsjrYw==";
const NOW: f64 = 1_000_000.0;
const SECRET: &[u8] = b"a secret of 32 bytes or even more";

fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// An issuer with a key of each kind.
pub struct Signer {
    rsa: RsaKeyPair,
    p256: EcdsaKeyPair,
    ed25519: Ed25519KeyPair,
}

impl Signer {
    pub fn new() -> Self {
        let random = SystemRandom::new();
        let rsa = RsaKeyPair::from_pkcs8(&STANDARD.decode(RSA_KEY).unwrap()).unwrap();
        let p256 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let p256 = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, p256.as_ref(), &random).unwrap();
        let ed25519 = Ed25519KeyPair::generate_pkcs8(&random).unwrap();
        Self { rsa, p256, ed25519: Ed25519KeyPair::from_pkcs8(ed25519.as_ref()).unwrap() }
    }

    fn modulus(&self) -> Vec<u8> {
        ring::rsa::PublicKeyComponents::<Vec<u8>>::from(self.rsa.public()).n
    }

    pub fn keys(&self) -> Vec<Value> {
        let point = self.p256.public_key().as_ref();
        vec![
            json!({"kty": "RSA", "kid": "rsa", "use": "sig", "alg": "RS256", "n": encode(self.modulus()), "e": "AQAB"}),
            json!({"kty": "EC", "kid": "p256", "crv": "P-256", "x": encode(&point[1..33]), "y": encode(&point[33..])}),
            json!({"kty": "OKP", "kid": "ed", "alg": "EdDSA", "crv": "Ed25519", "x": encode(self.ed25519.public_key())}),
        ]
    }

    fn key_set(&self) -> KeySet {
        KeySet::read(json!({"keys": self.keys()}).to_string().as_bytes()).unwrap()
    }

    /// Signs with the key of that name, whatever the header says.
    pub fn token(&self, header: &Value, claims: &Value, with: &str) -> String {
        let signed = format!("{}.{}", encode(header.to_string()), encode(claims.to_string()));
        let message = signed.as_bytes();
        let rsa = |padding| {
            let mut signature = vec![0; self.rsa.public().modulus_len()];
            self.rsa.sign(padding, &SystemRandom::new(), message, &mut signature).unwrap();
            signature
        };
        let signature = match with {
            "rsa" => rsa(&RSA_PKCS1_SHA256),
            "rsa512" => rsa(&RSA_PKCS1_SHA512),
            "p256" => self.p256.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec(),
            _ => self.ed25519.sign(message).as_ref().to_vec(),
        };
        format!("{signed}.{}", encode(signature))
    }
}

fn good() -> Value {
    json!({"iss": "https://id.example", "aud": "tickets", "sub": "ann", "exp": NOW + 600.0, "iat": NOW, "nbf": NOW})
}

fn with(change: &Value) -> Value {
    let mut claims = good();
    for (name, value) in change.as_object().unwrap() {
        claims[name] = value.clone();
    }
    claims
}

fn without(name: &str) -> Value {
    let mut claims = good();
    claims.as_object_mut().unwrap().remove(name);
    claims
}

/// As the gateway does it.
fn verify(token: &str, keys: &KeySet) -> Result<Claims, InvalidToken> {
    let token = Unverified::read(token)?;
    let claims = token.verified_by(keys.of(&token)?)?;
    let expected = Expected { issuer: "https://id.example".to_owned(), audience: Some("tickets".to_owned()) };
    check(&claims, &expected, NOW)?;
    Ok(claims)
}

#[rstest::rstest]
#[case(json!({"alg": "RS256", "kid": "rsa", "typ": "JWT"}), "rsa")]
#[case(json!({"alg": "ES256", "kid": "p256", "typ": "at+jwt"}), "p256")]
#[case(json!({"alg": "EdDSA", "kid": "ed", "typ": "application/at+JWT"}), "ed")]
#[case::by_its_newer_name(json!({"alg": "Ed25519", "kid": "ed"}), "ed")]
#[case::the_only_one_it_can_be(json!({"alg": "ES256"}), "p256")]
fn each_kind_of_key_is_taken(#[case] header: Value, #[case] with: &str) {
    let signer = Signer::new();
    let claims = verify(&signer.token(&header, &good(), with), &signer.key_set()).unwrap();
    assert_eq!((claims.iss.as_str(), claims.sub.as_str()), ("https://id.example", "ann"));
}

#[rstest::rstest]
#[case::another_algorithm_of_the_key(json!({"alg": "RS512", "kid": "rsa"}), "rsa512", InvalidToken::Algorithm)]
#[case::signed_by_another_algorithm(json!({"alg": "RS256", "kid": "rsa"}), "rsa512", InvalidToken::Signature)]
#[case::none(json!({"alg": "none", "kid": "rsa"}), "rsa", InvalidToken::Algorithm)]
#[case::none_in_capitals(json!({"alg": "NONE"}), "rsa", InvalidToken::Algorithm)]
#[case::secret_instead_of_key(json!({"alg": "HS256", "kid": "rsa"}), "rsa", InvalidToken::Algorithm)]
#[case::key_of_another_kind(json!({"alg": "ES256", "kid": "rsa"}), "p256", InvalidToken::Algorithm)]
#[case::signed_by_another_key(json!({"alg": "ES256", "kid": "p256"}), "ed", InvalidToken::Signature)]
#[case::unknown_key(json!({"alg": "RS256", "kid": "old"}), "rsa", InvalidToken::UnknownKey)]
#[case::critical_extension(json!({"alg": "RS256", "kid": "rsa", "crit": ["b64"], "b64": false}), "rsa", InvalidToken::Critical)]
#[case::critical_nothing(json!({"alg": "RS256", "kid": "rsa", "crit": null}), "rsa", InvalidToken::Critical)]
#[case::of_another_type(json!({"alg": "RS256", "kid": "rsa", "typ": "logout+jwt"}), "rsa", InvalidToken::Type)]
#[case::no_algorithm(json!({"kid": "rsa"}), "rsa", InvalidToken::Malformed)]
#[case::a_number_for_a_name(json!({"alg": "RS256", "kid": 7}), "rsa", InvalidToken::Malformed)]
fn other_signatures_are_not(#[case] header: Value, #[case] with: &str, #[case] error: InvalidToken) {
    let signer = Signer::new();
    assert_eq!(verify(&signer.token(&header, &good(), with), &signer.key_set()), Err(error));
}

#[rstest::rstest]
#[case::expired(with(&json!({"exp": NOW - 1.0})), Some(InvalidToken::Expired))]
#[case::this_moment(with(&json!({"exp": NOW})), Some(InvalidToken::Expired))]
#[case::never_expires(without("exp"), Some(InvalidToken::NoExpiry))]
#[case::no_time(with(&json!({"exp": "tomorrow"})), Some(InvalidToken::Malformed))]
#[case::a_clock_ahead(with(&json!({"iat": NOW + 59.0, "nbf": NOW + 59.0})), None)]
#[case::not_yet(with(&json!({"nbf": NOW + 61.0})), Some(InvalidToken::NotYet))]
#[case::from_the_future(with(&json!({"iat": NOW + 61.0})), Some(InvalidToken::NotYet))]
#[case::without_a_beginning(without("iat"), None)]
#[case::another_issuer(with(&json!({"iss": "https://id.example/"})), Some(InvalidToken::Issuer))]
#[case::issuer_among_others(with(&json!({"iss": ["https://id.example"]})), Some(InvalidToken::Malformed))]
#[case::no_issuer(without("iss"), Some(InvalidToken::Issuer))]
#[case::another_audience(with(&json!({"aud": "other"})), Some(InvalidToken::Audience))]
#[case::among_other_audiences(with(&json!({"aud": ["other", "tickets"]})), None)]
#[case::a_part_of_the_audience(with(&json!({"aud": "tickets-admin"})), Some(InvalidToken::Audience))]
#[case::no_audience(without("aud"), Some(InvalidToken::Audience))]
#[case::nobody(without("sub"), Some(InvalidToken::Subject))]
#[case::an_empty_name(with(&json!({"sub": ""})), Some(InvalidToken::Subject))]
fn what_it_says_has_to_fit(#[case] claims: Value, #[case] error: Option<InvalidToken>) {
    let signer = Signer::new();
    let token = signer.token(&json!({"alg": "EdDSA", "kid": "ed"}), &claims, "ed");
    assert_eq!(verify(&token, &signer.key_set()).err(), error);
}

#[test]
fn what_was_changed_or_is_no_token_is_refused() {
    let signer = Signer::new();
    let keys = signer.key_set();
    let token = signer.token(&json!({"alg": "EdDSA", "kid": "ed"}), &good(), "ed");
    let parts: Vec<&str> = token.split('.').collect();
    let others = encode(with(&json!({"sub": "bob"})).to_string());
    assert_eq!(verify(&format!("{}.{others}.{}", parts[0], parts[2]), &keys), Err(InvalidToken::Signature));
    assert_eq!(verify(&format!("{}.{}.", parts[0], parts[1]), &keys), Err(InvalidToken::Signature));
    let twice = encode(r#"{"alg":"EdDSA","alg":"none","kid":"ed"}"#);
    for text in [
        "",
        "x",
        "..",
        "a.b.c",
        parts[0],
        &format!("{token}.x"),
        &format!("{token}="),
        &token.replace('.', " "),
        &format!("{twice}.{}.{}", parts[1], parts[2]),
    ] {
        assert_eq!(verify(text, &keys), Err(InvalidToken::Malformed), "{text}");
    }
    let large = with(&json!({"more": "x".repeat(MAX_TOKEN_BYTES)}));
    let large = signer.token(&json!({"alg": "EdDSA", "kid": "ed"}), &large, "ed");
    assert_eq!(verify(&large, &keys), Err(InvalidToken::TooLarge));
}

/// Everybody who knows the public key would make tokens by it.
#[test]
fn a_public_key_is_no_secret() {
    let signer = Signer::new();
    for secret in [signer.modulus(), signer.ed25519.public_key().as_ref().to_vec()] {
        let token = signed_with(&secret, &good()).unwrap();
        assert_eq!(verify(&token, &signer.key_set()), Err(InvalidToken::Algorithm));
    }
}

/// Nor does a secret of the local stack make tokens of the issuer.
#[test]
fn a_secret_makes_tokens_of_its_own_issuer_only() {
    let secrets = Keys::one(SECRET.to_vec());
    let verify = |token: &str, seconds| local_token::verify(&Unverified::read(token).unwrap(), &secrets, seconds);
    let (now, ttl) = (Duration::from_secs(1_000_000), Duration::from_secs(60));
    let token = local_token::signed("ann", SECRET, now, ttl).unwrap();
    assert_eq!(verify(&token, NOW).unwrap().sub, "ann");
    assert_eq!(verify(&token, NOW + 60.0), Err(InvalidToken::Expired));
    let other = local_token::signed("ann", b"another secret of 32 bytes, or more", now, ttl).unwrap();
    assert_eq!(verify(&other, NOW), Err(InvalidToken::Signature));
    assert_eq!(verify(&signed_with(SECRET, &good()).unwrap(), NOW), Err(InvalidToken::Issuer));
    let signer = Signer::new();
    let of_issuer = signer.token(&json!({"alg": "EdDSA", "kid": "ed"}), &good(), "ed");
    assert_eq!(verify(&of_issuer, NOW), Err(InvalidToken::Algorithm));
}

#[test]
fn of_a_key_set_only_what_is_safe_is_used() {
    let signer = Signer::new();
    let [rsa, p256, ed] = <[Value; 3]>::try_from(signer.keys()).unwrap();
    let change = |key: &Value, name: &str, value: Value| {
        let mut key = key.clone();
        key[name] = value;
        key
    };
    let unusable = [
        change(&rsa, "use", json!("enc")),
        change(&rsa, "key_ops", json!(["sign"])),
        change(&rsa, "alg", json!("RS512")),
        change(&rsa, "alg", json!("RSA-OAEP")),
        change(&rsa, "n", json!(encode(&signer.modulus()[1..]))),
        change(&rsa, "n", json!(encode([0xff; 513]))),
        change(&rsa, "e", json!("")),
        change(&p256, "crv", json!("P-384")),
        change(&p256, "x", json!("AA")),
        change(&ed, "crv", json!("X25519")),
        change(&ed, "x", json!(encode([7; 33]))),
        json!({"kty": "oct", "kid": "secret", "k": encode(SECRET)}),
        json!("nonsense"),
    ];
    for key in &unusable {
        let alone = KeySet::read(json!({"keys": [key]}).to_string().as_bytes());
        assert!(alone.unwrap_err().to_string().contains("no key for signatures"), "{key}");
    }
    let padded = change(&rsa, "n", json!(encode([&[0], &signer.modulus()[..]].concat())));
    let mut all = unusable.to_vec();
    all.push(padded);
    let keys = KeySet::read(json!({"keys": all}).to_string().as_bytes()).unwrap();
    let token = |kid: Option<&str>| signer.token(&json!({"alg": "RS256", "kid": kid}), &good(), "rsa");
    assert!(verify(&token(Some("rsa")), &keys).is_ok() && verify(&token(None), &keys).is_ok());
    for wrong in ["", "{}", "[]", r#"{"keys":{}}"#, r#"{"keys":[]}"#] {
        assert!(KeySet::read(wrong.as_bytes()).is_err(), "{wrong}");
    }
}

/// With two keys of a kind the name decides; a token without one could mean either.
#[test]
fn a_token_names_its_key_where_there_are_several() {
    let (old, new) = (Signer::new(), Signer::new());
    let mut keys = [old.keys()[1].clone(), new.keys()[1].clone()];
    (keys[0]["kid"], keys[1]["kid"]) = (json!("old"), json!("new"));
    let set = KeySet::read(json!({"keys": keys}).to_string().as_bytes()).unwrap();
    for (signer, kid) in [(&old, "old"), (&new, "new")] {
        assert!(verify(&signer.token(&json!({"alg": "ES256", "kid": kid}), &good(), "p256"), &set).is_ok());
    }
    let swapped = old.token(&json!({"alg": "ES256", "kid": "new"}), &good(), "p256");
    assert_eq!(verify(&swapped, &set), Err(InvalidToken::Signature));
    let unnamed = old.token(&json!({"alg": "ES256"}), &good(), "p256");
    assert_eq!(verify(&unnamed, &set), Err(InvalidToken::UnknownKey));
    assert_eq!(Algorithm::named("es256"), None, "names are as they are written");
}
