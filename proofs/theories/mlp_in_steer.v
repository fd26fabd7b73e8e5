(** An affine steer at the MLP input is a weight update, exactly

    Claim.  For any MLP that reads its input u only through W_g u + b_g and
    W_u u + b_u, the steer v(u) = M u + v at mlp_in is the same function of u as
    the update

      W_g -> W_g (1 + M),  b_g -> b_g + W_g v,
      W_u -> W_u (1 + M),  b_u -> b_u + W_u v.

    With M = 0, a fixed vector at mlp_in is a pair of biases.  And for a single
    input u, a steer v that reproduces both moves of the pre-activations,
    W_g v = dW_g u and W_u v = dW_u u, reproduces the update (dW_g, dW_u) exactly,
    not only to first order.

    Assumptions.  None: any activation, any size, any commutative ring.

    Not said here.  The converse direction needs dW_g = W_g M and dW_u = W_u M with
    the *same* M; a general update of W_g and W_u is not of this form. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics glu_expansion.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section AffineSteer.
Variables (R : comRingType) (d n : nat).
Implicit Types (W : 'M[R]_(n, d)) (b : 'cV[R]_n) (M : 'M[R]_d) (u v : 'cV[R]_d).

(** W (u + (M u + v)) + b = (W (1 + M)) u + (b + W v) *)
Lemma affine_steer_preactivation W b M u v :
  W *m (u + (M *m u + v)) + b = (W *m (1%:M + M)) *m u + (b + W *m v).
Proof.
rewrite mulmxDr mulmx1 mulmxDl -mulmxA 2!mulmxDr -!addrA; congr (_ + (_ + _)).
exact: addrC.
Qed.

(** The equivalence, for an MLP F of two pre-activations. *)
Theorem mlp_in_steer_is_update (T : Type) (F : 'cV[R]_n -> 'cV[R]_n -> T)
    (Wg Wu : 'M[R]_(n, d)) (bg bu : 'cV[R]_n) M u v :
  F (Wg *m (u + (M *m u + v)) + bg) (Wu *m (u + (M *m u + v)) + bu)
    = F ((Wg *m (1%:M + M)) *m u + (bg + Wg *m v))
        ((Wu *m (1%:M + M)) *m u + (bu + Wu *m v)).
Proof. by rewrite !affine_steer_preactivation. Qed.

(** The same for a gated MLP without biases and a linear steer:
    glu(W_g, W_u)(u + M u) = glu(W_g + W_g M, W_u + W_u M)(u). *)
Theorem glu_linear_steer_is_update o (phi : R -> R) (Wg Wu : 'M[R]_(n, d))
    (Wd : 'M[R]_(o, n)) M u :
  glu phi Wg Wu Wd (u + M *m u) = glu phi (Wg + Wg *m M) (Wu + Wu *m M) Wd u.
Proof. by rewrite /glu !mulmxDr !mulmxDl !mulmxA. Qed.

(** One input: matching both pre-activation moves matches the update exactly. *)
Theorem mlp_in_matches_update o (phi : R -> R) (Wg Wu dWg dWu : 'M[R]_(n, d))
    (Wd : 'M[R]_(o, n)) u v :
    Wg *m v = dWg *m u -> Wu *m v = dWu *m u ->
  glu phi Wg Wu Wd (u + v) = glu phi (Wg + dWg) (Wu + dWu) Wd u.
Proof. by move=> Eg Eu; rewrite /glu !mulmxDr !mulmxDl Eg Eu. Qed.
End AffineSteer.
