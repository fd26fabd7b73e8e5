(** A fixed vector is a bias

    Block output h = x + (W_d m + b_d): skip part x, hidden activation m.

    Claims, exact.
      - The vector v added at mlp_out, the bias update b_d -> b_d + v, and v added at
        block_out give the same block output; hence the same model.
      - If a map N (a norm) stands between the MLP and the residual stream, x + N(y),
        a vector v added to y is the same as v added at block_out for all v and y only
        when N is a translation.  A map that does not see the scale of its input, as a
        norm without eps, is none.
      - Likewise v added at attn_out is the bias of the output projection W_o.
      - A bias b of the value projection of a head, whose attention weights a sum to 1,
        is the vector W_o b at attn_out.

    Assumptions.  Any commutative ring; real numbers are not needed.

    Not said here.  In floating point the three agree to rounding, not bit for bit. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics glu_exactness.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section FixedVector.
Variables (R : comRingType) (d n : nat).
Implicit Types (x v y b : 'cV[R]_d) (m : 'cV[R]_n) (W : 'M[R]_(d, n)).

(** mlp_out vector = bias of W_d = block_out vector. *)
Theorem fixed_vector_is_bias x W b m v :
  x + ((W *m m + b) + v) = x + (W *m m + (b + v))
  /\ x + (W *m m + (b + v)) = (x + (W *m m + b)) + v.
Proof. by rewrite !addrA. Qed.

(** attn_out vector = bias of W_o, for x the stream before attention and c the
    concatenated heads. *)
Theorem attn_out_vector_is_bias x W b c v :
  x + ((W *m c + b) + v) = x + (W *m c + (b + v)).
Proof. by rewrite !addrA. Qed.

(** With a map N after the MLP the sites agree only when N is a translation. *)
Theorem post_norm_breaks (N : 'cV[R]_d -> 'cV[R]_d) x :
  (forall y v, x + N (y + v) = (x + N y) + v) <-> (forall y, N y = N 0 + y).
Proof.
split=> E => [y|y v]; first by apply: (addrI x); rewrite addrA -E add0r.
by rewrite (E (y + v)) (E y) !addrA.
Qed.

(** N (y + y) = N y at one y other than 0 is enough: N is no translation. *)
Theorem scale_blind_is_no_translation (N : 'cV[R]_d -> 'cV[R]_d) y :
  y != 0 -> N (y + y) = N y -> ~ (forall z, N z = N 0 + z).
Proof.
move=> /eqP y0 blind E; apply: y0; apply: (addrI (N 0 + y)).
by rewrite addr0 -addrA -!E blind.
Qed.

End FixedVector.

Section ValueBias.
Variables (R : comRingType) (d k o T : nat).

(** The matrix b 1^T: the bias b at every token. *)
Definition every_token (b : 'cV[R]_k) : 'M[R]_(k, T) := \matrix_(i, j) b i 0.

(** (b 1^T) a = b when the entries of a sum to 1. *)
Lemma every_token_mulmx b (a : 'cV[R]_T) : \sum_j a j 0 = 1 -> every_token b *m a = b.
Proof.
move=> a1; apply/colP=> i; rewrite !mxE -[RHS]mulr1 -a1 mulr_sumr.
by apply: eq_bigr => j _; rewrite mxE.
Qed.

(** W_o (W_v X + b 1^T) a = W_o W_v X a + W_o b *)
Theorem value_bias_is_vector (Wo : 'M[R]_(o, k)) (Wv : 'M[R]_(k, d)) X b (a : 'cV_T) :
    \sum_j a j 0 = 1 ->
  Wo *m ((Wv *m X + every_token b) *m a) = head Wo Wv X a + Wo *m b.
Proof. by move=> a1; rewrite mulmxDl mulmxDr every_token_mulmx. Qed.
End ValueBias.
