CREATE INDEX IF NOT EXISTS payment_attempts_by_object ON payment_attempts (provider, object_id) WHERE object_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS payment_attempts_by_charge ON payment_attempts (provider, charge_id) WHERE charge_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS payment_attempts_charged ON payment_attempts (began_at) WHERE state = 'Charged';
CREATE INDEX IF NOT EXISTS payment_attempts_in_doubt ON payment_attempts (key)
    WHERE state IN ('Begun', 'NotCharged', 'Confirming', 'Reconfirming', 'NeedsBuyer');
