-- What was asked of payment. One row per key; whoever works on it has a claim that runs out.
CREATE TABLE payments (
    key           text PRIMARY KEY,
    amount_cents  integer NOT NULL CHECK (amount_cents > 0),
    currency      text NOT NULL,
    claim         uuid,
    claimed_until timestamptz,
    created_at    timestamptz NOT NULL DEFAULT now()
);

-- What was tried with each provider. Written before anything is sent: 'Begun' means that nobody knows yet whether the
-- provider has charged, and then no other provider may be asked.
CREATE TABLE payment_attempts (
    key       text NOT NULL REFERENCES payments (key),
    provider  text NOT NULL,
    state     text NOT NULL CHECK (state IN ('Begun', 'Charged', 'NotCharged', 'Declined')),
    charge_id text,
    -- How often it was asked: an outcome of an earlier time says nothing about this one.
    asks      integer NOT NULL DEFAULT 1,
    began_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (key, provider),
    CHECK ((state = 'Charged') = (charge_id IS NOT NULL))
);
